"""Generations on disk: everything that one remembers between two chunks, written and read back bit for bit."""
