"""Chunks that fail: NaN in their latents, and callbacks that raise."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from benchmarks.faults.generation import Faults, is_stock
from benchmarks.faults.tally import Tally


def failing(faults: Faults, fault: Callable[[Any, int], Any], error: type[Exception], count: int) -> Tally:
    """Let a callback fail in a random step; the pipeline is the stock one again, and the memory is freed."""
    tally = Tally()
    for _ in range(faults.times(count)):
        at, seen = faults.draw.randrange(2, 2 * len(faults.whole)), []
        sessions = list[weakref.ref[Any]]()

        def callback(
            pipe: Any, _: int, __: Any, tensors: Any, at: int = at, seen: list[int] = seen, sessions: Any = sessions
        ) -> Any:
            seen.append(0)
            if len(seen) < at:
                return {}
            sessions += map(weakref.ref, pipe.packforcing.sessions.values())
            return fault(tensors, len(seen))

        with faults.new_folder() as folder:
            stream = faults.stream(callback_on_step_end=callback)
            with suppress(error):
                faults.generate(folder, stream)
            del stream
            gc.collect()
            if not sessions or any(each() is not None for each in sessions) or not is_stock(faults.pipe):
                tally.tried += 1
                continue
            faults.check(tally, folder, {"callback_on_step_end": lambda *_: {}})
    return tally


def poisoned(tensors: Any, _: int) -> Any:
    """Put NaN into the latents."""
    return {"latents": tensors["latents"] * torch.nan}


def raising(_: Any, __: int) -> Any:
    """Fail in a callback."""
    raise ZeroDivisionError("a callback failed")
