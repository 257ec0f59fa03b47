"""AnyFlow-FAR."""
