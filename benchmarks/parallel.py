"""Heads over 1, 2 and 4 processes (gloo, CPU): equality, bytes held and bytes sent, against the count on paper.

A Wan pipeline of two layers, four heads of 128 channels and random weights generates in one process and, with
`enable_parallelism(config=ContextParallelConfig(ulysses_degree=n))`, in n of them. Processes are forks on one machine;
nothing here says how fast anything is.

difference          largest difference of the latents from those of one process, as a part of the largest number
choices             chunks for which blocks were chosen
other choices       chunks whose attended blocks are others than those of one process
held / share        resident_bytes of the rank that holds most, over an n-th of those of one process
sent a chunk        bytes that the rank which sends most has sent to others for the last chunk, diffusers' own gather of
                    the output included
on paper            the same, as `on_paper` counts it
off paper           how far the two are apart, as a part of what is on paper

Deterministic, one sample each.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import context_parallel
from torch import Tensor

import kvpack
from benchmarks.report import SEED, Bar, Row, say, script
from kvpack.testing import tiny_wan_pipeline
from kvpack.testing.ranks import enable_ulysses, run_ranks

LAYERS, HEADS, HEAD_DIM, CHANNELS, PATCH, GRID = 2, 4, 128, 16, 4, (4, 4)
STEPS, CHUNK, ITEM = 2, 2, 4
SIZES = {"chunk_frames": CHUNK, "sink_frames": 2, "recent_frames": 2, "topk": 3, "archive_blocks": 6}
DEEP = {"chunk_frames": CHUNK, "window_frames": 8, "sink_frames": 2, "recent_frames": 2, "budget_frames": 6}
STACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "packforcing": ("packforcing", SIZES),
    "packforcing of the paper's roles": ("packforcing", {**SIZES, "compressor": "pool", "selector": "topk"}),
    "packforcing, dual": ("packforcing", {**SIZES, "compressor": "dual", "selector": "topk"}),
    "deep-forcing": ("deep-forcing", DEEP),
    "h2o": ("h2o", {"chunk_frames": CHUNK, "budget_frames": 8, "recent_frames": 2}),
}
BARS = (
    Bar("the latents of one process", "", "difference", 1e-5, timed=False),
    Bar("the choices of one process", "", "other choices", 0, timed=False),
    Bar("a rank holds its share", "", "held / share", 1.05, timed=False),
    Bar("as many bytes are sent as on paper", "", "off paper", 0.01, timed=False),
)


@dataclass(frozen=True)
class Made:
    """What one process has of a generation.

    Args:
        latents: the video.
        choices: the attended blocks of each chunk.
        held: bytes at the end.
        sent: bytes sent for the last chunk.
    """

    latents: Tensor
    choices: list[str]
    held: int
    sent: int


def attention_bytes(layers: int, width: int, tokens: int, ranks: int, itemsize: int) -> int:
    """Return the bytes that a rank sends for attention: of four tensors in every layer, what is another's of its share.

    Args:
        layers: of the model.
        width: channels of a token, heads times their size.
        tokens: of all forwards, each filled up to equal shares.
        ranks: among which heads are split.
        itemsize: bytes of a number.

    >>> attention_bytes(30, 1536, 5 * 6240, 4, 2)
    2156544000
    """
    return 4 * layers * tokens // ranks * width * itemsize * (ranks - 1) // ranks


def on_paper(name: str, ranks: int) -> int:
    """Return the bytes that the first rank sends for a chunk once its memory is full.

    A forward sends, of queries, keys, values and the result in every layer, what is another rank's of its share; and
    its share of the output to all others. The first rank sends the chunk's latents to all others. A compressor that is
    given all heads needs keys and values of the block that leaves, and a selector sums one number for each block.
    """
    _, options = STACKS[name]
    frame, width, others = GRID[0] * GRID[1], HEADS * HEAD_DIM, ranks - 1
    chunk, forwards = CHUNK * frame, STEPS + 1
    # Twins ride in the commit, and fill its shares.
    twins = -(-(CHUNK // 2 * max(1, GRID[0] // 4) * max(1, GRID[1] // 4)) // ranks) * ranks
    riding = twins if options.get("compressor") == "dual" else 0
    tokens = attention_bytes(LAYERS, width, forwards * chunk + riding, ranks, ITEM)
    output = (forwards * chunk + riding) // ranks * PATCH * CHANNELS * ITEM * others
    latents = CHUNK * CHANNELS * frame * PATCH * ITEM * others
    looks = name == "packforcing"  # keep-farthest: keys and values of the block
    gathered = 2 * LAYERS * chunk * width // ranks * ITEM * others if looks else 0
    return tokens + output + latents + gathered


def generated(name: str, frames: int, ranks: int) -> dict[str, Any]:
    """Return what one of `ranks` processes makes, as plain data."""
    pipe = tiny_wan_pipeline(num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=LAYERS)
    pipe.set_progress_bar_config(disable=True)
    outputs: Counter[str] = Counter()
    if ranks > 1:
        enable_ulysses(pipe.transformer, ranks)
        _count_outputs(outputs)
    stack, options = STACKS[name]
    kvpack.enable(pipe, stack, **options)
    choices, sent = [], [0]

    def look(_: Any) -> None:
        stats = pipe.packforcing.stats()
        choices.append(repr(stats["selected"]) if stats.get("selected") else "")
        sent.append(sum(stats.get("sent_bytes", {}).values()) + outputs["output"])

    call = {"height": 16 * GRID[0], "width": 16 * GRID[1], "num_frames": frames, "num_inference_steps": STEPS}
    latents = pipe(
        "a red circle",
        **call,
        guidance_scale=1.0,
        max_sequence_length=8,
        output_type="latent",
        generator=torch.Generator().manual_seed(SEED),
        on_chunk=look,
    ).frames
    held = pipe.packforcing.stats()["resident_bytes"]
    return {"latents": latents, "choices": choices, "held": held, "sent": sent[-1] - sent[-2]}


def _count_outputs(outputs: Counter[str]) -> None:
    """Count what diffusers gathers itself, in a process that ends with its generations."""
    unshard = context_parallel.EquipartitionSharder.unshard.__func__  # type: ignore[attr-defined]

    def counted(cls: type, tensor: Tensor, dim: int, mesh: Any) -> Tensor:
        outputs["output"] += tensor.nbytes * (mesh.size() - 1)
        whole: Tensor = unshard(cls, tensor, dim, mesh)
        return whole

    context_parallel.EquipartitionSharder.unshard = classmethod(counted)  # type: ignore[assignment, method-assign]


def compared(name: str, ranks: int, alone: Made, each: list[Made]) -> list[Row]:
    """Return the figures of a generation in several processes."""
    scale, paper = float(alone.latents.abs().max()), on_paper(name, ranks)
    sent = max(made.sent for made in each)
    pairs = [(made.choices, alone.choices) for made in each]
    figures = {
        "difference": (max(float((made.latents - alone.latents).abs().max()) for made in each) / scale, "ratio"),
        "choices": (sum(map(bool, alone.choices)), "chunks"),
        "other choices": (sum(a != b for mine, one in pairs for a, b in zip(mine, one, strict=True)), "chunks"),
        "held / share": (max(made.held for made in each) * ranks / alone.held, "ratio"),
        "sent a chunk": (sent, "bytes"),
        "on paper": (paper, "bytes"),
        "off paper": (abs(sent - paper) / paper, "ratio"),
    }
    return [Row(f"{name}, {ranks} processes", what, v, v, v, unit, 1) for what, (v, unit) in figures.items()]


def run(small: bool = False) -> list[Row]:
    """Compare all stacks in 2 and 4 processes with one."""
    rows, frames = [], 101 if small else 229
    for name in STACKS:
        alone = Made(**generated(name, frames, 1))
        for ranks in (2, 4):
            say(f"parallel: {name}, {ranks} processes")
            made = run_ranks(ranks, lambda _, n=name, r=ranks: generated(n, frames, r), seconds=300)  # type: ignore[misc]
            rows += compared(name, ranks, alone, [Made(**each) for each in made])
    return rows


if __name__ == "__main__":
    script("parallel", __doc__, run, BARS)
