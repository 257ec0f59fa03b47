"""Whether a chunk takes the same time and memory late in a video as early, and 5,000 chunks on end.

Streams 125 chunks (500 latent frames) of the toy pipeline, decoded: `packforcing` as it comes, with an archive of at
most 32 blocks, and `full`. Then 5,000 chunks of a one-layer pipeline with random weights, at absolute positions
(which end at frame 20,000, far beyond the 1,024 rows of a stock RoPE table), one step a chunk, as latents.

late / early is the ratio of the medians over chunks 100-120 and 30-50 (5,000 chunks: the last fifth and the second);
low and high are the ends of its 95 % bootstrap interval, and for all other rows the least and the greatest. Resident
memory is that of the process. One thread, since most of the tensors are too small for more.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
import torch
from diffusers import WanPipeline

from benchmarks.report import ROOT, SEED, Bar, Row, median_ratio, samples, say, script
from kvpack.testing import tiny_wan_pipeline

TIME, SESSION, RESIDENT = "chunk time, late / early", "session memory, late / early", "resident memory, late / early"
BARS = (
    Bar("chunk time does not grow", "packforcing", TIME, 1.05),
    Bar("memory of the session does not grow", "packforcing", SESSION, 1.05, timed=False),
    Bar("resident memory does not grow", "packforcing", RESIDENT, 1.05),
    Bar("memory of the session does not grow in 5,000 chunks", "length", SESSION, 1.0, timed=False),
    Bar("resident memory does not grow in 5,000 chunks", "length", RESIDENT, 1.05),
)
PROMPT = "a red circle"
ARCHIVE = 32


@dataclass(frozen=True)
class Plan:
    """How many chunks are generated, and which of them are early and late."""

    chunks: int
    early: range
    late: range


STEADY = Plan(125, range(30, 51), range(100, 121))
LENGTH = Plan(5_000, range(1_000, 2_000), range(4_000, 5_000))
SMALL_STEADY = Plan(30, range(18, 24), range(24, 30))
SMALL_LENGTH = Plan(60, range(40, 50), range(50, 60))


@dataclass(frozen=True)
class Sample:
    """What one chunk took."""

    seconds: float
    session_bytes: int
    resident_bytes: int


def pipeline(small: bool) -> tuple[Any, str]:
    """The toy pipeline that is shipped, or the one in training; without either, and if small, random weights."""
    for folder in (ROOT / "kvpack" / "data" / "toyworld", ROOT / "runs" / "toyworld" / "pipeline"):
        if (folder / "model_index.json").exists() and not small:
            return WanPipeline.from_pretrained(folder), f"toy pipeline ({folder.relative_to(ROOT)})"
    return tiny_wan_pipeline(), "tiny pipeline of random weights"


def stream(pipe: Any, **call: Any) -> Iterator[Sample]:
    """Generates without end."""
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 1.0, "max_sequence_length": 16, "generator": torch.Generator().manual_seed(SEED)}
    frames, process = pipe.packforcing.stream(PROMPT, **{**options, **call}), psutil.Process()
    while True:
        start = time.perf_counter()
        frame = next(frames)
        spent = time.perf_counter() - start
        if not bool(torch.as_tensor(frame).isfinite().all()):
            raise FloatingPointError("the pipeline made frames that are not finite")
        yield Sample(spent, pipe.packforcing.stats()["resident_bytes"], process.memory_info().rss)


def rows(subject: str, plan: Plan, chunks: list[Sample]) -> list[Row]:
    """Time and memory early, late and in ratio."""
    early, late = ([chunks[i] for i in part] for part in (plan.early, plan.late))
    made = []
    for name, part in (
        (f"chunks {plan.early[0]}-{plan.early[-1]}", early),
        (f"chunks {plan.late[0]}-{plan.late[-1]}", late),
    ):
        made += [
            samples(subject, f"time of a chunk, {name}", [1e3 * each.seconds for each in part], "ms"),
            samples(subject, f"session memory, {name}", [each.session_bytes / 2**20 for each in part], "MiB"),
            samples(subject, f"resident memory, {name}", [each.resident_bytes / 2**20 for each in part], "MiB"),
        ]
    return [
        *made,
        median_ratio(subject, TIME, [each.seconds for each in late], [each.seconds for each in early]),
        median_ratio(subject, SESSION, [each.session_bytes for each in late], [each.session_bytes for each in early]),
        median_ratio(
            subject, RESIDENT, [each.resident_bytes for each in late], [each.resident_bytes for each in early]
        ),
    ]


def steady(small: bool) -> list[Row]:
    """`packforcing` and `full` on the toy pipeline."""
    plan, made = SMALL_STEADY if small else STEADY, []
    side = 32 if small else 64
    for stack, options in (("packforcing", {"archive_blocks": 4 if small else ARCHIVE}), ("full", {})):
        pipe, name = pipeline(small)
        pipe.enable_packforcing(stack, **options)
        say(f"steady: {stack}, {name}")
        call = {"height": side, "width": side, "num_inference_steps": 1 if small else 4, "output_type": "np"}
        made += rows(f"{stack}, {name}", plan, list(islice(stream(pipe, **call), plan.chunks)))
    return made


def length(small: bool) -> list[Row]:
    """As many chunks on end as nobody will watch."""
    plan = SMALL_LENGTH if small else LENGTH
    pipe = tiny_wan_pipeline(num_layers=1)
    pipe.enable_packforcing(compressor="pool", reindexer="absolute", archive_blocks=ARCHIVE)
    say(f"steady: {plan.chunks:,} chunks")
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent"}
    chunks = list(islice(stream(pipe, **call), plan.chunks))
    subject = "length: one layer of random weights"
    done = float(len(chunks))
    return [
        Row(subject, "chunks without error", done, done, done, "chunks", 1),
        samples(subject, "last position", [done * pipe.packforcing.stack.chunk_frames - 1], "frame"),
        *rows(subject, plan, chunks),
    ]


def run(small: bool = False) -> list[Row]:
    """Steady first, then length."""
    return [*steady(small), *length(small)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    script("steady", __doc__, run, BARS)
