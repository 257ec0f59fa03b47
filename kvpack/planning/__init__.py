"""What a generation will hold and compute, without a model."""
