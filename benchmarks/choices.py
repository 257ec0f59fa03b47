"""How `packforcing` chooses mid blocks: how fast choices change, whether layers agree, how many are simply the newest.

Minutes of the shipped pipeline with its own memory; choices are read from traces. The distance of two choices is
Jaccard's, 1 - |both| / |either|: 0 for the same blocks, 1 for none in common (arXiv 2603.25730 tells of .75 between
successive ones). Chunks count once there are four times as many blocks as are chosen. Beside each figure stands the one
of a choice at random from the same blocks. Values are means over chunks and videos; low and high are the least and the
greatest mean of a video.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.leaderboard.rollout import pipeline
from benchmarks.report import SEED, Bar, Row, say, script
from benchmarks.toyworld import world
from kvpack.shipped import CALL, STACK_OPTIONS, TRAINING, shipped_folder

SINK_FRAMES, RECENT_FRAMES = 8, 4  # latent frames of `packforcing` that are no blocks
CHUNK, TOPK = TRAINING["chunk_frames"], STACK_OPTIONS["packforcing"]["topk"]
BARS: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What a layer attends in a chunk.

    Args:
        blocks: chosen blocks, 0 is the oldest.
        of: how many blocks there are.
    """

    blocks: frozenset[int]
    of: int

    def newest(self) -> float:
        """Return which share of it is among the newest.

        >>> Choice(frozenset({1, 8}), 9).newest()
        0.5
        """
        return sum(block >= self.of - len(self.blocks) for block in self.blocks) / len(self.blocks)


def distance(one: Choice, other: Choice) -> float:
    """Return Jaccard's distance.

    >>> distance(Choice(frozenset({1, 2, 3}), 9), Choice(frozenset({2, 3, 4}), 9))
    0.5
    """
    return 1 - len(one.blocks & other.blocks) / len(one.blocks | other.blocks)


def measure(small: bool) -> list[Row]:
    """Make videos of some captions, and compare what their layers choose."""
    captions, frames = (1, 381) if small else (8, 961)
    torch.set_num_threads(1)  # tensors this small are slower on several
    pipe = pipeline(shipped_folder())
    videos = []
    with TemporaryDirectory() as folder:
        for seed, scene in enumerate(world.HELD_OUT[:captions]):
            say(f"choices: video {seed + 1} of {captions}")
            videos.append(choices(traced(pipe, scene.caption, seed, frames, Path(folder, "trace.jsonl"))))
    draw = random.Random(SEED)
    return [*rows("packforcing", videos), *rows("at random", [at_random(each, draw) for each in videos])]


def traced(pipe: Any, caption: str, seed: int, frames: int, path: Path) -> list[dict[str, Any]]:
    """Make a video, and return the lines of its trace that tell of a chunk."""
    pipe.enable_packforcing()
    pipe.packforcing.trace(path)
    call = {**CALL, "num_inference_steps": 6, "generator": torch.Generator().manual_seed(seed)}
    for _ in pipe.packforcing.stream(caption, num_frames=frames, output_type="latent", **call):
        pass
    pipe.disable_packforcing()
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def choices(lines: list[dict[str, Any]]) -> dict[int, list[Choice]]:
    """Return the choices of each layer, chunk by chunk."""
    found: dict[int, list[Choice]] = {}
    for line in lines:
        blocks = (line["first_frame"] - SINK_FRAMES - RECENT_FRAMES) // CHUNK
        if blocks >= 4 * TOPK:
            for layer in line["attended"]:
                found.setdefault(layer["layer"], []).append(Choice(frozenset(_blocks(layer["frames"])), blocks))
    return found


def _blocks(ranges: list[tuple[int, int, str]]) -> Iterator[int]:
    for first, frames, part in ranges:
        if part == "mid":
            yield from range((first - SINK_FRAMES) // CHUNK, (first + frames - SINK_FRAMES) // CHUNK)


def at_random(video: Mapping[int, list[Choice]], draw: random.Random) -> dict[int, list[Choice]]:
    """Return as many blocks, drawn from all there are, for each choice."""
    return {
        layer: [Choice(frozenset(draw.sample(range(each.of), len(each.blocks))), each.of) for each in chosen]
        for layer, chosen in video.items()
    }


def rows(subject: str, videos: list[dict[int, list[Choice]]]) -> list[Row]:
    """Return the figures of some videos."""
    found = []
    for layer in videos[0]:
        changes = [fmean(distance(*two) for two in pairwise(video[layer])) for video in videos]
        newest = [fmean(each.newest() for each in video[layer]) for video in videos]
        found.append(_row(f"{subject}, layer {layer}", "distance to the chunk before", changes))
        found.append(_row(f"{subject}, layer {layer}", "share of the newest blocks", newest))
    return [*found, _row(f"{subject}, two layers", "distance in a chunk", [_apart(video) for video in videos])]


def _apart(video: Mapping[int, list[Choice]]) -> float:
    return fmean(distance(*both) for two in combinations(video.values(), 2) for both in zip(*two, strict=True))


def _row(subject: str, metric: str, values: list[float]) -> Row:
    return Row(subject, metric, fmean(values), min(values), max(values), "ratio", len(values))


if __name__ == "__main__":
    script("choices", __doc__ or "", measure, BARS)
