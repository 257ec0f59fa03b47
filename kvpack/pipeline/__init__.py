"""The diffusers pipeline: enabling, disabling and following a generation."""
