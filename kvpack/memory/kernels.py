"""Triton kernels, which are there with torch for CUDA on Linux, where they compile."""

from collections.abc import Callable
from typing import TypeVar

from kvpack.errors import first_line
from kvpack.logging import get_logger

logger = get_logger(__name__)
Kernel = TypeVar("Kernel")


def tried(launched: Callable[[], Kernel], lost: str) -> Kernel | None:
    """Return a kernel, or None where Triton is not there or fails, which is logged.

    Args:
        launched: imports the kernel, launches it once, and returns it.
        lost: what is done without it then.
    """
    try:
        return launched()
    except ImportError:  # no Triton here, which is no failure
        return None
    except Exception as error:  # whatever Triton raises where a compiler or a driver is missing
        logger.warning("%s without Triton, which fails here: %s", lost, first_line(error))
        return None
