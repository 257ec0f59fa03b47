"""Training of what compresses the memory of a frozen model, inside the graph of its rollout."""
