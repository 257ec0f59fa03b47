"""What a checkpoint holds: reading, LoRA, known recipes, conversion and the model's own settings."""
