"""One generation: what a model family must say, and what is the same for all of them."""
