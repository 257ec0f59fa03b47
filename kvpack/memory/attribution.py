"""Which policy it was: named in what it raises, its seconds in `stats()`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any


@contextmanager
def policy_call(policy: object, method: str, seconds: dict[str, float], layer: int | None = None) -> Iterator[None]:
    """Names the policy in any error of the block, whose type and message stay, and counts the block's seconds.

    Args:
        policy: whose method is called.
        method: its name.
        seconds: by class name of a policy; the host's, which on a GPU are those of launching.
        layer: index of the layer that it is called for.

    >>> with policy_call(object(), "select", spent := {}):
    ...     pass
    >>> list(spent)
    ['object']
    """
    cls, start = type(policy), perf_counter()
    try:
        yield
    except Exception as error:
        where = "" if layer is None else f", layer {layer}"
        error.add_note(f"raised in {cls.__name__}.{method} of {cls.__module__}{where}")
        raise
    finally:
        seconds[cls.__name__] = seconds.get(cls.__name__, 0.0) + perf_counter() - start


def memory_call(memory: Any, method: str, seconds: dict[str, float], layer: int | None = None) -> Any:
    """Do as `policy_call` for a memory's method, unless the policies that it is made of are named instead."""
    return nullcontext() if memory.composite else policy_call(memory, method, seconds, layer)
