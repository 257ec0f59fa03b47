"""Frames of a memory's rollout, chunk by chunk, and of the references.

Noise is drawn a chunk at a time and everything is causal, so the beginning of a long video is the short video of the
same seed to the bit: one rollout at the longest length serves all lengths. Each caption has a generator of its own, so
that its video depends neither on the batch nor on how many captions there are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.baselines import floors, through_vae
from benchmarks.leaderboard.lengths import frames
from benchmarks.leaderboard.store import COSTS
from benchmarks.toyworld import world
from benchmarks.toyworld.world import Scene, Video
from kvpack.memory import Memory
from kvpack.pipeline.enable import disable, enable
from kvpack.shipped import CALL


@dataclass(frozen=True, eq=False)
class BlockEntry:
    """Some consecutive frames of a few videos, uint8 [batch, t, H, W, 3], and their cost a video, see `COSTS`."""

    videos: Video
    cost: npt.NDArray[np.float64] | None = None


def pieces(
    pipe: Any, source: Memory | str, scenes: Sequence[Scene], first: int, seconds: int, seed: int, steps: int
) -> Iterator[BlockEntry]:
    """Yield the videos of some scenes, piece by piece.

    Args:
        pipe: the pipeline, in eval mode.
        source: a memory, or the name of a reference.
        scenes: their captions are generated together.
        first: index of the first scene among all, which sets its noise.
        seconds: length of the videos.
        seed: of the noise, or of the reference's clips.
        steps: denoising steps of a chunk.
    """
    if isinstance(source, Memory):
        yield from _generated(pipe, source, scenes, first, seconds, seed, steps)
    else:
        rows = [reference(pipe, source, scene, 1000 * seed + first + i, seconds) for i, scene in enumerate(scenes)]
        yield BlockEntry(np.stack(rows))


def reference(pipe: Any, name: str, scene: Scene, seed: int, seconds: int) -> Video:
    """Make a video without a memory, [T, H, W, 3].

    "truth" is the rendered clip through the VAE, which no generator behind that VAE can beat; the others are the
    floors of `benchmarks.baselines`.
    """
    truth = world.make_clip(scene, seed, frames(seconds)).video
    return through_vae(pipe.vae, truth) if name == "truth" else floors(truth, seed)[name]


def _generated(
    pipe: Any, stack: Memory, scenes: Sequence[Scene], first: int, seconds: int, seed: int, steps: int
) -> Iterator[BlockEntry]:
    enable(pipe, stack)
    generators = [torch.Generator().manual_seed(1000 * seed + first + index) for index in range(len(scenes))]
    stream = pipe.packforcing.stream(
        prompt=[scene.caption for scene in scenes],
        num_frames=frames(seconds),
        num_inference_steps=steps,
        generator=generators,
        output_type="np",
        **CALL,
    )
    try:
        while True:
            start = time.thread_time()
            chunk = next(stream, None)
            if chunk is None:
                return
            spent = time.thread_time() - start
            stats = pipe.packforcing.stats()
            tokens, rows = stats["attended_tokens"], len(scenes)
            cost = np.array([spent / rows, tokens, *(stats[name] / rows for name in COSTS[2:])])
            yield BlockEntry(np.round(chunk * 255).astype(np.uint8), cost)
    finally:
        stream.close()
        disable(pipe)
