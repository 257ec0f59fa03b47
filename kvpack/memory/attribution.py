"""Which policy it was: named in what it raises, its seconds in `stats()`."""

from contextlib import nullcontext
from time import perf_counter
from types import TracebackType
from typing import Any

from kvpack.errors import PolicyError


class policy_call:  # a class and no generator, since it runs a dozen times a chunk
    """Name the policy in any error of the block, whose type and message stay, and count the block's seconds.

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

    __slots__ = ("_layer", "_method", "_policy", "_seconds", "_start")

    def __init__(self, policy: object, method: str, seconds: dict[str, float], layer: int | None = None) -> None:
        self._policy, self._method, self._seconds, self._layer = type(policy), method, seconds, layer

    def __enter__(self) -> None:
        self._start = perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        name = self._policy.__name__
        self._seconds[name] = self._seconds.get(name, 0.0) + perf_counter() - self._start
        if isinstance(error, Exception):
            name_policy(error, self._policy, self._method, self._layer)


def name_policy(error: Exception, policy: type, method: str, layer: int | None = None) -> None:
    """Add to an error which policy's method raised it."""
    where = "" if layer is None else f", layer {layer}"
    error.add_note(f"raised in {policy.__name__}.{method} of {policy.__module__}{where}")


def broken(policy: object, method: str, given: str, rule: str, layer: int | None = None) -> PolicyError:
    """Return the error for what a policy's method returned: what that was, and what is right."""
    where = "" if layer is None else f" in layer {layer}"
    return PolicyError(f"{type(policy).__name__}.{method} returned {given}{where}, but {rule}")


def memory_call(memory: Any, method: str, seconds: dict[str, float], layer: int | None = None) -> Any:
    """Do as `policy_call` for a memory's method, unless the policies that it is made of are named instead."""
    return nullcontext() if memory.composite else policy_call(memory, method, seconds, layer)
