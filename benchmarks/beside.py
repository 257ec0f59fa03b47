"""Decoding beside denoising: the first frames and a chunk's time of a stream, with `decode_device` and without.

A Wan pipeline with random weights, whose layers are sized so that denoising a chunk takes about as long as decoding it.
Both kinds of stream are drawn from in turn, each with one thread of torch's an operation; the machine has to have two
idle cores for the figures to mean anything, and one with an accelerator for the VAE gains as `on paper` says.

first frames      seconds until the first chunk's frames are there, which is a chunk later beside
a chunk           seconds between two chunks' frames behind the first
a chunk, ratio    beside over in between, with its bootstrap interval
on paper          longer part / both parts, of the seconds that `stats()` says of a stream without `decode_device`
other frames      frames that are not the same bits

Medians with least and greatest; the streams have their own processor time to share with whatever else runs.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.report import SEED, Bar, Row, median_ratio, samples, say, script
from kvpack.testing import tiny_wan_pipeline

BARS = (Bar("the same frames", "", "other frames", 0, timed=False),)
SIZES = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 2, "archive_blocks": 4}


def drawn(pipe: Any, frames: int, **options: Any) -> tuple[list[Any], list[float]]:
    """Return a stream's chunks, and the seconds that each took."""
    call = {"height": 96, "width": 96, "num_frames": frames, "num_inference_steps": 2, "guidance_scale": 1.0}
    generator, parts, seconds = torch.Generator().manual_seed(SEED), [], []
    stream = pipe.packforcing.stream(
        "a red circle", **call, max_sequence_length=8, output_type="pt", generator=generator, **options
    )
    with stream:
        start = time.perf_counter()
        for part in stream:
            parts.append(part)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return parts, seconds


def run(small: bool = False) -> list[Row]:
    """Draw from both kinds of stream in turn."""
    torch.set_num_threads(1)
    pipe = tiny_wan_pipeline(num_attention_heads=8, attention_head_dim=64, num_layers=2 if small else 6, ffn_dim=1024)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_packforcing("packforcing", **SIZES)
    frames, firsts, chunks, other, parts = (29 if small else 93), ([], []), ([], []), 0, []
    for index in range(2 if small else 6):
        say(f"beside: round {index}")
        between, seconds = drawn(pipe, frames)
        spent = pipe.packforcing.stats()["seconds"]
        parts.append((spent["decode"], spent["denoise"] + spent["commit"]))
        beside, ahead = drawn(pipe, frames, decode_device="cpu")
        other += sum(not torch.equal(a, b) for a, b in zip(between, beside, strict=True))
        if index:  # the first round warms up
            for at, each in enumerate((seconds, ahead)):
                firsts[at].append(each[0])
                chunks[at].extend(each[1:-1])  # behind the last chunk beside there is nothing to denoise
    paper = [max(each) / sum(each) for each in parts[1:] or parts]
    return [
        samples("decoded in between", "first frames", firsts[0], "seconds"),
        samples("decoded in between", "a chunk", chunks[0], "seconds"),
        samples("decoded beside", "first frames", firsts[1], "seconds"),
        samples("decoded beside", "a chunk", chunks[1], "seconds"),
        median_ratio("decoded beside", "a chunk, ratio", chunks[1], chunks[0]),
        samples("decoded beside", "on paper", paper, "ratio"),
        Row("decoded beside", "other frames", other, other, other, "chunks", 1),
    ]


if __name__ == "__main__":
    script("beside", __doc__, run, BARS)
