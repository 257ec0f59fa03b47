"""Clocks that jump by hours, or stand still, while a generation is saved, told of, and gone on with."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.faults.generation import Faults
from benchmarks.faults.tally import Tally

HOURS = 3600.0
_CLOCKS = {"time": 1.0, "monotonic": 1.0, "perf_counter": 1.0, "time_ns": 1e9, "monotonic_ns": 1e9}


def wall_jumps(draw: Random) -> dict[str, Callable[[], float]]:
    """The time of day is another one each time somebody asks, hours before or behind."""
    begun = time.time()
    return {"time": lambda: begun + draw.uniform(-48, 48) * HOURS}


def stands_still(draw: Random) -> dict[str, Callable[[], float]]:
    """No clock moves."""
    now = draw.uniform(0, 1e6)
    return {name: lambda: now for name in ("time", "monotonic", "perf_counter")}


def leaps(draw: Random) -> dict[str, Callable[[], float]]:
    """Between two looks at any clock hours have passed, as behind a sleep of the machine."""
    ticks = count()
    return {name: lambda: next(ticks) * 5 * HOURS for name in ("time", "monotonic", "perf_counter")}


KINDS = (wall_jumps, stands_still, leaps)


@contextmanager
def clocks(kind: Callable[[Random], dict[str, Callable[[], float]]], draw: Random) -> Iterator[None]:
    """Put other clocks into the module `time` for the length of a block; who sleeps or waits does it as before."""
    before, changed = {name: getattr(time, name) for name in _CLOCKS}, kind(draw)
    for name, unit in _CLOCKS.items():
        if (read := changed.get(name.removesuffix("_ns"))) is not None:
            setattr(time, name, read if unit == 1 else lambda read=read: int(read() * 1e9))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(time, name, function)


def jumping(faults: Faults, tries: int) -> Tally:
    """Generate under such clocks, with files of any age; the last two snapshots are kept, and the newest is taken."""
    tally = Tally()
    for index in range(max(len(KINDS), faults.times(tries))):
        with faults.new_folder() as folder, clocks(KINDS[index % len(KINDS)], faults.draw):
            if _generated(faults, folder):
                faults.check(tally, folder)
            else:
                tally.tried += 1
    return tally


def _generated(faults: Faults, folder: Path) -> bool:
    """Generate some chunks; return whether what is told of them can be, and just the last two snapshots are there."""
    told: list[Any] = []
    stream = faults.stream(on_chunk=told.append)
    chunks = faults.draw.randrange(1, len(faults.whole))
    stream.save(folder)
    for _, _ in zip(range(chunks), stream, strict=False):
        _aged(folder, faults.draw)
        stream.save(folder)
    stream.close()
    kept = {path.name for path in folder.glob("snapshot-*")}
    figures = [figure for each in told for figure in (each.seconds, each.fps, each.video_seconds)]
    seconds = faults.pipe.packforcing.stats()["seconds"].values()
    return kept == {f"snapshot-{chunks:06d}.json", f"snapshot-{chunks + 1:06d}.json"} and all(
        math.isfinite(each) and each >= 0 for each in (*figures, *seconds)
    )


def _aged(folder: Path, draw: Random) -> None:
    """Let files look as if they were written at any time."""
    for path in folder.iterdir():
        age = draw.uniform(-1e6, 1e6) * HOURS / 60
        os.utime(path, (1.7e9 + age, 1.7e9 + age))
