"""Ten thousand chunks on end: whether time, memory and open files stay what they are, for every stack in every tier.

"memory" is a session alone, one layer with random keys and values: every installed stack, and those that keep
compressed blocks once on each tier, at most 32 blocks. "pipeline" is a tiny Wan pipeline of one layer with random
weights, streamed as latents, one step a chunk. Each runs in a process of its own.

late / early compares the last fifth of the chunks with the second. The time is the processor's; a sample is the mean of
50 chunks over that of the first chunks of a generation that begins beside it, since a machine's clock drifts by more
than a tenth within minutes. Low and high are the ends of the ratio's 95 % bootstrap interval. Resident memory is the
process's, once what malloc keeps free was given back. `full` keeps everything, and grows: it is not here.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, get_args

import psutil  # type: ignore[import-untyped,unused-ignore]
import torch

from benchmarks.report import (
    SEED,
    Bar,
    Row,
    commit,
    folder,
    median_ratio,
    merged,
    parser,
    read,
    samples,
    say,
    table,
    write,
)
from kvpack.memory.codec import DENSE, Tier
from kvpack.memory.geometry import Geometry
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
from kvpack.plugins.registry import registry
from kvpack.testing import run_session, tiny_wan_pipeline

TIME, RESIDENT = "chunk time, late / early", "resident memory, late / early"
FILES, HELD = "open files, late - early", "memory of the session, late / early"
BARS = (
    Bar("chunk time does not grow", "", TIME, 1.05),
    Bar("resident memory does not grow", "", RESIDENT, 1.01),
    Bar("memory of the session does not grow", "", HELD, 1.0, timed=False),
    Bar("no file is left open", "", FILES, 0, timed=False),
)
CHUNKS, BLOCKS = 10_000, 32
YOUNG = 15  # chunks of a generation that begins anew for each sample
SMALL_CHUNKS, SMALL_BLOCKS = 80, 8
GEOMETRY = Geometry(layers=1, heads=2, head_dim=12, grid=(2, 3), rope_split=(4, 4, 4))
CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 16,
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}


@dataclass(frozen=True)
class Subject:
    """What runs.

    Args:
        kind: "memory" or "pipeline".
        stack: its policy.
    """

    kind: str
    stack: Any

    def __str__(self) -> str:
        parts = [self.stack.name]
        if isinstance(self.stack, Stack) and keeps_blocks(self.stack):
            parts += [f"tier {self.stack.tier}", self.stack.reindexer.name]
            parts += [self.stack.store.name] if self.stack.store != DENSE else []
        return f"{self.kind}: {', '.join(parts)}"


def keeps_blocks(stack: Stack) -> bool:
    """Whether a stack ever fills an archive."""
    session = Session(stack, GEOMETRY)
    run_session(session, 24, steps=1)
    return bool(session.past.states[0].archive.slots)


def subjects(blocks: int = BLOCKS) -> Iterator[Subject]:
    """Every stack in every tier, with so many compressed blocks at most."""
    absolute = registry().stack(
        "packforcing", {"compressor": "pool", "reindexer": "absolute", "archive_blocks": blocks}
    )
    stacks = [absolute]
    for name in sorted(set(registry().stacks) - {"full"}):
        stack = registry().stack(name, {})
        if not isinstance(stack, Stack) or not keeps_blocks(stack):
            stacks.append(stack)
            continue
        bounded = replace(stack, archive_blocks=min(blocks, stack.archive_blocks or blocks))
        stacks += [replace(bounded, tier=tier) for tier in get_args(Tier)]
        if name == "packforcing":  # whose keys are then decoded in every forward
            stacks.append(replace(bounded, store=registry().policy("codec", "int8")))
    yield Subject("pipeline", absolute)
    yield from (Subject("memory", stack) for stack in stacks)
    yield from (Subject("pipeline", stack) for stack in stacks[1:])


def memory(stack: Any) -> Iterator[int]:
    """Runs a session alone, and yields what it holds behind each chunk."""
    session = Session(stack, GEOMETRY)
    for number in count():
        run_session(session, 1, seed=number, steps=1)
        yield session.stats()["resident_bytes"]


def pipeline(stack: Any) -> Iterator[int]:
    """Streams, and yields what the memory holds behind each chunk."""
    pipe: Any = tiny_wan_pipeline(num_layers=1)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_packforcing(stack)
    for _ in pipe.packforcing.stream(**CALL, generator=torch.Generator().manual_seed(SEED)):
        yield pipe.packforcing.stats()["resident_bytes"]


def timed(running: Iterator[int], chunks: int) -> tuple[float, int]:
    """Seconds of the processor that a chunk takes, and the most that the memory holds behind one."""
    start = time.process_time()
    held = max(islice(running, chunks))
    return (time.process_time() - start) / chunks, held


def soaked(subject: Subject, chunks: int) -> list[Row]:
    """Rows of one subject."""
    each, process = max(chunks // 200, 4), psutil.Process()
    kind = {"memory": memory, "pipeline": pipeline}[subject.kind]
    running = kind(subject.stack)
    gc.freeze()  # what is there already, so that collecting is no work
    seconds, relative, held = list[float](), list[float](), list[int]()
    resident, files = list[int](), list[int]()
    for _ in range(chunks // each):
        young = kind(subject.stack)
        next(young)  # builds its pipeline
        reference, _ = timed(young, min(YOUNG, each))
        del young
        took, most = timed(running, each)
        seconds.append(took)
        relative.append(took / reference)
        held.append(most)
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        resident.append(process.memory_info().rss)
        files.append(process.num_fds())
    fifth, name = len(seconds) // 5, str(subject)
    early, late = slice(fifth, 2 * fifth), slice(-fifth, None)
    opened = max(files[late]) - max(files[early])
    return [
        samples(name, "chunks", [each * len(seconds)], "chunks"),
        samples(name, "time of a chunk, early", [1e3 * one for one in seconds[early]], "ms"),
        samples(name, "resident memory, late", [one / 2**20 for one in resident[late]], "MiB"),
        median_ratio(name, TIME, relative[late], relative[early]),
        median_ratio(name, HELD, held[late], held[early]),
        median_ratio(name, RESIDENT, resident[late], resident[early]),
        Row(name, FILES, opened, opened, opened, "files", len(files)),
    ]


def apart(work: Callable[[], list[Row]]) -> list[Row]:
    """What a child process returns; a fork, so that it costs no import."""
    with tempfile.TemporaryDirectory() as place:
        child = os.fork()
        if not child:
            code = 1
            try:
                write("rows", work(), Path(place))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"a soak ended with {os.waitstatus_to_exitcode(status)}")
        return read(Path(place) / "rows.json")


def run(
    small: bool = False,
    chunks: int | None = None,
    only: str = "",
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """All subjects; a small run has a few of them.

    Args:
        small: whether the figures mean nothing.
        chunks: of each subject.
        only: how a subject's name begins.
        keep: called with the rows so far behind each subject.
    """
    rows, every = list[Row](), subjects(SMALL_BLOCKS if small else BLOCKS)
    chosen = [each for each in every if str(each).startswith(only)]
    if not chosen:
        sys.exit(f"no subject's name begins with {only!r}; take one of soak.json, or its beginning")
    for subject in chosen[::6] if small else chosen:
        start = time.perf_counter()
        made = apart(lambda subject=subject: soaked(subject, chunks or (SMALL_CHUNKS if small else CHUNKS)))
        rows += made
        ratio = next(row.value for row in made if row.metric == TIME)
        say(f"soak: {subject}: {time.perf_counter() - start:.0f} s, chunk time {ratio:.3f}")
        keep(rows)
    return rows


def main() -> None:
    """The command line: rows are kept behind each subject, so that a run can be ended early."""
    made = parser(__doc__ or "")
    made.add_argument("--chunks", type=int, help=f"of each subject ({CHUNKS:,})")
    made.add_argument("--only", default="", help="how a subject's name begins; the other rows stay as they are")
    options = made.parse_args()
    words = ["python", "-m", "benchmarks.soak", *(["--small"] if options.small else [])]
    words += ["--chunks", str(options.chunks)] if options.chunks else []
    words += ["--only", shlex.quote(options.only)] if options.only else []
    stamp = {"command": " ".join(words), "commit": commit()}

    def keep(rows: list[Row]) -> None:
        stamped = [replace(row, **stamp) for row in rows]
        path = folder(options) / "soak.json"
        write("soak", merged(path, stamped) if options.only else stamped, folder(options))

    rows = run(options.small, options.chunks, options.only, keep)
    print(f"{(__doc__ or '').splitlines()[0]}\n{table(rows)}")
    for bar in BARS:
        if not (options.small and bar.timed):
            print(bar.verdict(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
