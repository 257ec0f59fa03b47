"""The version of this installation."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kvpack")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0"
