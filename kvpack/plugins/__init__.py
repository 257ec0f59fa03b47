"""Plugins: hooks, the registry, and names resolved to memories."""
