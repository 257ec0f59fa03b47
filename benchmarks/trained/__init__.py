"""What a memory can learn by a loss that looks where the middle of a video matters."""
