"""Whether a chunk of AnyFlow-FAR costs the same late in a video as early: upstream, and kvpack, in one run.

42 chunks of two latent frames (128x128 pixels, 64 tokens a frame, four steps) of a two-layer pipeline with random
weights. Upstream is the stock pipeline, which encodes all of history again behind every chunk, the older chunks in its
own compressed patches. kvpack is `packforcing` with the same patches (`native`), sink 4 frames, 4 blocks, recent 4.

A chunk begins where the one before it is clean: the encoding of that one and the steps of its own. Tokens are those
that go through a layer for it. Time of chunk n is of chunks n - 2 to n + 1, all in two rounds of upstream and six of
kvpack; low and high are the least and the greatest, and of ratios the ends of a 95 % bootstrap interval. Times
are of the processor, in one thread, so that neighbours count less; upstream's flex attention runs without a compiler.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from benchmarks.report import SEED, Bar, Row, median_ratio, samples, say, script
from kvpack.testing import tiny_anyflow_far_pipeline

TIME, TOKENS = "time, chunk 40 / chunk 10", "tokens, chunk 40 / chunk 10"
BARS = (
    Bar("chunk 40 takes no longer than chunk 10", "kvpack", TIME, 1.05),
    Bar("chunk 40 is no more tokens than chunk 10", "kvpack", TOKENS, 1.0, timed=False),
)
CHUNKS, FRAMES, AT = 42, 2, (10, 20, 40)
MODEL = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512}
SMALL_MODEL = {"num_layers": 1}
ORDER = ("upstream", "kvpack", "kvpack", "kvpack") * 2
OPTIONS = {"sink_frames": 4, "recent_frames": 4, "topk": 4}


@dataclass(frozen=True)
class Sample:
    """What one chunk took."""

    seconds: float
    tokens: int


def generate(pipe: Any, small: bool) -> list[Sample]:
    """Each chunk of one video."""
    steps, side = (1, 32) if small else (4, 128)
    marks, tokens = [(time.process_time(), 0)], 0

    def count(_: Any, inputs: Any) -> None:
        nonlocal tokens
        tokens += inputs[0].shape[1]

    def mark(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == steps - 1:
            marks.append((time.process_time(), tokens))
        return tensors

    noise = torch.randn(1, 16, CHUNKS * FRAMES, side // 8, side // 8, generator=torch.Generator().manual_seed(SEED))
    handle = pipe.transformer.blocks[0].register_forward_pre_hook(count)
    output = pipe(
        "a red circle",
        height=side,
        width=side,
        num_frames=4 * noise.shape[2] - 3,
        latents=noise,
        chunk_partition=[FRAMES] * CHUNKS,
        num_inference_steps=steps,
        max_sequence_length=16,
        output_type="latent",
        callback_on_step_end=mark,
    )
    handle.remove()
    if not bool(output.frames.isfinite().all()):
        raise FloatingPointError("the pipeline made latents that are not finite")
    return [Sample(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(marks)]


def rows(subject: str, rounds: list[list[Sample]]) -> list[Row]:
    """Time and tokens at some chunks, and in ratio."""
    found = {n: [chunk for chunks in rounds for chunk in chunks[n - 2 : n + 2]] for n in AT}
    early, late = found[AT[0]], found[AT[-1]]
    return [
        *(samples(subject, f"time, chunk {n}", [1e3 * each.seconds for each in found[n]], "ms") for n in AT),
        *(samples(subject, f"tokens, chunk {n}", [each.tokens for each in found[n]], "tokens") for n in AT),
        median_ratio(subject, TIME, [each.seconds for each in late], [each.seconds for each in early]),
        median_ratio(subject, TOKENS, [each.tokens for each in late], [each.tokens for each in early]),
    ]


def run(small: bool = False) -> list[Row]:
    """Upstream and kvpack in turn."""
    pipe = tiny_anyflow_far_pipeline(**(SMALL_MODEL if small else MODEL))
    pipe.set_progress_bar_config(disable=True)
    rounds: dict[str, list[list[Sample]]] = {"upstream": [], "kvpack": []}
    for subject in ORDER[:2] if small else ORDER:
        say(f"anyflow: {subject}")
        pipe.disable_packforcing()
        if subject == "kvpack":
            pipe.enable_packforcing(chunk_frames=FRAMES, **OPTIONS)
        rounds[subject].append(generate(pipe, small))
    return [row for subject, chunks in rounds.items() for row in rows(subject, chunks)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    script("anyflow", __doc__ or "", run, BARS)
