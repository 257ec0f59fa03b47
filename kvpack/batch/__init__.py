"""Many videos: what a file of prompts asks for, made by several processes, and gone on with after any of them ends."""
