"""The command `kvpack`."""

from kvpack.cli.main import app, main

__all__ = ["app", "main"]
