"""Decoding beside denoising: the first frames and a chunk's time of a stream, with `decode_device` and without.

Wan pipelines with random weights; both kinds of stream are drawn from in turn.

on two cores      layers are sized so that denoising a chunk takes about as long as decoding it; one thread of torch's;
                  two idle cores are needed for the figures to mean anything
parts that wait   a step and a decoding of the tiny pipeline, each with a wait in it, as for a device that has its own
                  work: what the order of the work alone is good for, on a busy machine too

first frames      seconds until the first chunk's frames are there, which is a chunk later beside
a chunk           seconds between two chunks' frames behind the first
ratio of a chunk  beside over in between, with its bootstrap interval
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

BARS = (
    Bar("the same frames", "", "other frames", 0, timed=False),
    Bar("a chunk takes its longer part, where both wait", "parts that wait, decoded beside", "ratio of", 0.75),
)
SIZES = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 2, "archive_blocks": 4}


class Waiting:
    """Waits, and does what it is wrapped around."""

    def __init__(self, call: Any, seconds: float) -> None:
        self.call, self.seconds = call, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.call, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the wrapped returns, later."""
        time.sleep(self.seconds)
        return self.call(*args, **kwargs)


def drawn(pipe: Any, frames: int, size: int, wait: float, **options: Any) -> tuple[list[Any], list[float]]:
    """Return a stream's chunks, and the seconds that each took."""
    call = {"height": size, "width": size, "num_frames": frames, "num_inference_steps": 2, "guidance_scale": 1.0}
    if wait:
        call["callback_on_step_end"] = Waiting(lambda _, __, ___, kwargs: kwargs, wait / 2)
    generator, parts, seconds = torch.Generator().manual_seed(SEED), [], []
    stream = pipe.packforcing.stream(
        "a red circle", **call, max_sequence_length=8, output_type="pt", generator=generator, **options
    )
    if wait:
        stream._run._decode = Waiting(stream._run._decode, wait)
    with stream:
        start = time.perf_counter()
        for part in stream:
            parts.append(part)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return parts, seconds


def compared(subject: str, pipe: Any, rounds: int, frames: int, size: int, wait: float = 0.0) -> list[Row]:
    """Draw from both kinds of stream in turn."""
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_packforcing("packforcing", **SIZES)
    firsts, chunks, other, parts = ([], []), ([], []), 0, []
    for index in range(rounds):
        say(f"beside: {subject}, round {index}")
        between, seconds = drawn(pipe, frames, size, wait)
        spent = pipe.packforcing.stats()["seconds"]
        parts.append((spent["decode"], spent["denoise"] + spent["commit"]))
        beside, ahead = drawn(pipe, frames, size, wait, decode_device="cpu")
        other += sum(not torch.equal(a, b) for a, b in zip(between, beside, strict=True))
        if index:  # the first round warms up
            for at, each in enumerate((seconds, ahead)):
                firsts[at].append(each[0])
                chunks[at].extend(each[1:-1])  # behind the last chunk beside there is nothing to denoise
    paper = [max(each) / sum(each) for each in parts[1:]]
    before, behind = f"{subject}, decoded in between", f"{subject}, decoded beside"
    return [
        samples(before, "first frames", firsts[0], "seconds"),
        samples(before, "a chunk", chunks[0], "seconds"),
        samples(behind, "first frames", firsts[1], "seconds"),
        samples(behind, "a chunk", chunks[1], "seconds"),
        median_ratio(behind, "ratio of a chunk", chunks[1], chunks[0]),
        samples(behind, "on paper", paper, "ratio"),
        Row(behind, "other frames", other, other, other, "chunks", 1),
    ]


def run(small: bool = False) -> list[Row]:
    """Compare both kinds of stream, with work and with waits."""
    torch.set_num_threads(1)
    layers, rounds, frames = (2, 2, 29) if small else (6, 6, 93)
    large = tiny_wan_pipeline(num_attention_heads=8, attention_head_dim=64, num_layers=layers, ffn_dim=1024)
    rows = compared("on two cores", large, rounds, frames, 96)
    wait = 0.1 if small else 0.5
    return rows + compared("parts that wait", tiny_wan_pipeline(), 2 if small else 3, frames, 32, wait)


if __name__ == "__main__":
    script("beside", __doc__, run, BARS)
