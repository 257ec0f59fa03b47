"""What kvpack says beside its errors: through the logger `kvpack`, whose verbosity is set as diffusers' is.

`kvpack.logging.set_verbosity_info()`, or the variable `KVPACK_VERBOSITY=info`, tells of each chunk.
"""

import logging
import os
import sys
from logging import DEBUG, ERROR, INFO, WARNING


class _StandardError(logging.Handler):
    """Writes to standard error where the program has set up no logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        if not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr, flush=True)  # noqa: T201  # it is what this handler is for


def get_logger(name: str = "kvpack") -> logging.Logger:
    """Return the library's logger, or that of one of its modules."""
    return logging.getLogger(name)


def get_verbosity() -> int:
    """Return the level of the library's logger, as one of `logging`'s."""
    return get_logger().getEffectiveLevel()


def set_verbosity(level: int) -> None:
    """Set the level of the library's logger, e.g. `logging.INFO`."""
    get_logger().setLevel(level)


def set_verbosity_debug() -> None:
    """Log everything."""
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """Log each chunk: its number, speed and bytes held."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    """Log what may surprise, which is the default."""
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """Log errors only."""
    set_verbosity(ERROR)


get_logger().addHandler(_StandardError())
set_verbosity(logging.getLevelNamesMapping().get(os.environ.get("KVPACK_VERBOSITY", "").upper(), WARNING))
