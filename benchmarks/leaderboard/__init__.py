"""Memories side by side on the toy world: generated once, measured by `kvpack.evaluation`, with intervals."""
