"""Seconds of parts of a computation."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Clock:
    """Seconds spent in named parts, those in inner parts not counted; a leaf has no inner parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open: list[bool] = []

    @contextmanager
    def part(self, name: str, outer: str = "", leaf: bool = False) -> Iterator[None]:
        """Charges the time inside to `name`, instead of to the part `outer` that is open."""
        if self.open and self.open[-1]:
            yield
            return
        self.open.append(leaf)
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.open.pop()
        self.seconds[name] += spent
        if outer:
            self.seconds[outer] -= spent

    def timed(self, call: Callable[..., Any], name: str, outer: str = "", leaf: bool = False) -> Callable[..., Any]:
        """The same call on this clock."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name, outer, leaf):
                return call(*args, **kwargs)

        return timed

    def watch(self, owner: object, method: str, name: str, outer: str = "", leaf: bool = False) -> None:
        """Times every call of one object's method."""
        # Past the setter: policies are frozen.
        object.__setattr__(owner, method, self.timed(getattr(owner, method), name, outer, leaf))


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
