"""CPU time of each stack's chunks without a model, of this checkout and of another one, in alternating rounds.

    python -m benchmarks.bookkeeping --against FOLDER [--only STACK ...]

A round is a process of one thread that drives a session of every stack through 40 chunks at a tiny size, where what is
measured is bookkeeping, with random tensors and an attention of a few tokens that both checkouts share. Rounds of the
two checkouts follow each other in turns, whose order changes each time. A ratio is the least time of this checkout's
repeats over that of the other in the same turn: its median over turns, with the 95 % bootstrap interval of the median.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import RESULTS, ROOT, SEED, SMALL_RESULTS, Bar, Row, commit, say, table, write

CHUNKS, TURNS, REPEATS = 40, 9, 3
RATIO = "this / other"
BARS = (Bar("bookkeeping of four-role stacks is no slower", "four-role stack", RATIO, 1.05),)


def sessions(names: Sequence[str]) -> dict[str, Any]:
    """Return what makes a session of each stack; resolves in this checkout and in one of before `Session(memory)`."""
    import kvpack
    from kvpack.testing import TINY

    try:
        from kvpack.plugins.registry import registry
    except ImportError:
        from kvpack.registry import registry  # type: ignore[import-not-found,no-redef,unused-ignore]  # of before
    if Path.cwd() not in Path(kvpack.__file__).parents:
        raise RuntimeError(f"kvpack came from {kvpack.__file__}, but this round is of {Path.cwd()}")
    found = registry()

    def maker(name: str) -> Any:
        memory = found.stack(name, {})
        own = getattr(memory, "session", None)
        return lambda: own(TINY) if own is not None else kvpack.Session(memory, TINY)

    return {name: maker(name) for name in names or found.names("stack")}


def measure(names: Sequence[str], chunks: int, repeats: int) -> dict[str, float]:
    """Return the CPU seconds of a chunk of each stack: the least of some repeats, after one that warms up."""
    import torch

    from kvpack.testing import run_session

    torch.set_num_threads(1)
    least = {}
    with torch.no_grad():
        for name, make in sessions(names).items():
            spent = []
            for repeat in range(repeats + 1):
                start = time.process_time()
                run_session(make(), chunks if repeat else 6)
                spent.append(time.process_time() - start)
            least[name] = min(spent[1:]) / chunks
    return least


def in_checkout(folder: Path, names: Sequence[str], chunks: int, repeats: int) -> dict[str, float]:
    """Return what `measure` gives in a process over another checkout."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(chunks), str(repeats), *names]
    paths = [str(folder), *([str(ROOT)] if folder != ROOT else [])]  # kvpack of the folder, this script's of here
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def four_roles() -> set[str]:
    """Return the installed stacks of four policies."""
    from kvpack.memory.stack import Stack
    from kvpack.plugins.registry import registry

    found = registry()
    return {name for name in found.names("stack") if isinstance(found.stack(name, {}), Stack)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a median (2,000 resamples, seeded)."""
    draw = random.Random(SEED)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def rows(turns: Sequence[tuple[dict[str, float], dict[str, float]]]) -> list[Row]:
    """Return time and ratio of each stack."""
    made, stacks = [], four_roles()
    for name in turns[0][0]:
        mine, theirs = ([1e3 * side[name] for side in each] for each in zip(*turns, strict=True))
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        subject = f"{'four-role stack' if name in stacks else 'other memory'}, {name}"
        for metric, values, unit in (("this", mine, "ms"), ("other", theirs, "ms"), (RATIO, ratios, "ratio")):
            low, high = interval(values)
            made.append(Row(subject, metric, median(values), low, high, unit, len(values)))
    return made


def run(against: Path, names: Sequence[str] = (), turns: int = TURNS, chunks: int = CHUNKS) -> list[Row]:
    """Compare two checkouts."""
    done = []
    for turn in range(turns):
        say(f"bookkeeping: turn {turn + 1} of {turns}")
        order = [ROOT, against] if turn % 2 else [against, ROOT]
        both = {folder: in_checkout(folder, names, chunks, REPEATS) for folder in order}
        done.append((both[ROOT], both[against]))
    return rows(done)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="root of the other checkout")
    parser.add_argument("--only", nargs="+", default=[], metavar="STACK")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from dataclasses import replace

    command = " ".join(["python -m benchmarks.bookkeeping --against", options.against.name, *options.only])
    source = commit()
    figures = [
        replace(row, command=command, commit=source) for row in run(options.against, options.only, options.turns)
    ]
    print(table(figures))
    for bar in BARS:
        print(bar.verdict(figures))
    folder = options.out or (SMALL_RESULTS if options.only else RESULTS)
    print(f"written to {write('bookkeeping', figures, folder)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[4:], int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
