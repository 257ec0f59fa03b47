"""Wan 2.1 and 2.2, and everything trained from them in that format."""

from kvpack.adapters.wan.adapter import WanAdapter

__all__ = ["WanAdapter"]
