"""Faults: a checkpointing generation is killed, damaged, lied to and starved; each time it is resumed and compared.

Every kind of fault is tried many times on the tiny Wan pipeline with random weights. "tried" counts the faults;
"survived" those behind which the generation went on from a snapshot, was begun anew where there was none yet, or, where
no snapshot can be right, was refused in one line by an error of kvpack. "bit-identical" counts those of the "resumed"
whose remaining frames are the very bits of the generation that nothing interrupted; "lost" and "other bits" are what is
missing. A child process is a fork, so that a kill costs no import.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.faults import chunks, clocks, files, memory, processes
from benchmarks.faults.generation import Faults
from benchmarks.faults.tally import BARS, Tally
from benchmarks.report import Row, say
from kvpack.errors import NonFiniteLatentsError

__all__ = ["BARS", "Faults", "Tally", "kinds", "run"]


def kinds() -> dict[str, Callable[[Faults], Tally]]:
    """All kinds of faults."""
    return {
        "kill -9 at a random moment": lambda faults: processes.killed(faults, signal.SIGKILL, 100),
        "SIGINT at a random moment": lambda faults: processes.killed(faults, signal.SIGINT, 20),
        "SIGTERM at a random moment": lambda faults: processes.killed(faults, signal.SIGTERM, 20),
        "kill -9 at each file operation of a save": processes.killed_at_file_operations,
        "kill -9 of kvpack generate, decoded frames": lambda faults: processes.killed_videos(faults, 20),
        "disk full at each file operation of a save": processes.full_disk,
        "disk full while a file is written": lambda faults: processes.full_files(faults, 40),
        "a file of the newest snapshot is damaged": lambda faults: files.damaged(faults, 100),
        "a snapshot's tree is changed, with its checksum": lambda faults: files.hostile(faults, 2000),
        "NaN in a chunk": lambda faults: chunks.failing(faults, chunks.poisoned, NonFiniteLatentsError, 20),
        "an exception in a callback": lambda faults: chunks.failing(faults, chunks.raising, ZeroDivisionError, 20),
        **{f"no memory: {name}": partial(memory.out_of_memory, name=name) for name in memory.MEMORIES},
        "clocks that jump or stand still": lambda faults: clocks.jumping(faults, 30),
        "two processes save into one folder": processes.two_writers,
    }


def run(small: bool = False) -> list[Row]:
    """Counts of each kind of fault."""
    if not hasattr(os, "fork"):
        sys.exit("this benchmark needs os.fork")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), small)
        for name, fault in kinds().items():
            start = time.perf_counter()
            tally = fault(faults)
            say(f"faults: {name}: {tally} in {time.perf_counter() - start:.0f} s")
            rows += tally.rows(name)
    return rows
