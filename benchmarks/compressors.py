"""How much of what a model predicts is lost behind compressed history, and what compressing costs.

`distillation_loss`: on held-out clips of the toy world, 32 latent frames, the mean squared difference of velocities
behind packed and behind whole history, over the four chunks that attend one to four compressed blocks and 6 denoising
steps. All have the same tokens. Low and high are 95 % bootstrap intervals over captions and seeds.

`chunk time / pool's - 1`: medians over chunks of a decoded stream, the compressors taking turns, on one thread; low and
high are the ends of the 95 % bootstrap interval. Pooling itself takes a hundredth of a percent.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.clock import seconds
from benchmarks.leaderboard import bootstrap
from benchmarks.report import Score
from benchmarks.toyworld import world
from kvpack.adapters import WanAdapter
from kvpack.generation.trainee import Trainee
from kvpack.policies import packforcing
from kvpack.shipped import CALL, shipped_folder
from kvpack.training.clips import Clip
from kvpack.training.compressor import frozen
from kvpack.training.distillation import ContextDistillation
from kvpack.training.targets import targets

FIRST_SEED = 9 * 10**7  # of clips that no `make` target trains on
SECONDS, FRAMES, STEPS = 8, 32, 6
WARM = 20  # chunks until as many blocks are attended as ever


def held_out(trainee: Trainee, seeds: int) -> list[list[Clip]]:
    """Clips of each held-out caption."""
    clips = []
    for index, scene in enumerate(world.HELD_OUT):
        embeds, row = trainee.embed([scene.caption])[0], []
        for seed in range(seeds):
            video = world.make_clip(scene, FIRST_SEED + 100 * index + seed, 4 * FRAMES - 3).video
            pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            row.append(Clip(f"{scene.caption}, {seed}", trainee.encode(pixels)[0], embeds))
        clips.append(row)
    return clips


def losses(objective: ContextDistillation, clips: list[list[Clip]]) -> bootstrap.Array:
    """Loss of each clip, [captions, seeds]."""

    def loss(clip: Clip) -> float:
        return float(np.mean(list(objective.measure([clip], targets(objective.stack, FRAMES), seed=0).values())))

    return np.array([[loss(clip) for clip in row] for row in clips])


def times(folder: Path, compressors: Sequence[str], chunks: int) -> dict[str, list[float]]:
    """Seconds of each chunk by compressor."""
    streams: dict[str, Any] = {}
    spent: dict[str, list[float]] = {name: [] for name in compressors}
    for name in compressors:
        pipeline = frozen(folder, torch.float32, "cpu")
        pipeline.enable_packforcing(compressor=name)
        source = torch.Generator().manual_seed(0)
        call = {**CALL, "num_inference_steps": STEPS, "generator": source, "output_type": "np"}
        streams[name] = pipeline.packforcing.stream(world.HELD_OUT[0].caption, **call)
    for chunk in range(WARM + chunks):
        for name, stream in streams.items():
            took = seconds(partial(next, stream))
            if chunk >= WARM:
                spent[name].append(took)
    return spent


def main() -> None:
    """The whole command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=shipped_folder(), help="default: the shipped one")
    parser.add_argument("--trained", type=Path, nargs="*", default=[], help="folders of trained compressors")
    parser.add_argument("--seeds", type=int, default=4, help="clips of each held-out caption")
    parser.add_argument("--chunks", type=int, default=150, help="timed chunks of each compressor; 0 times none")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the figures")
    options = parser.parse_args()
    pipeline = frozen(options.pipeline, torch.float32, "cpu")
    trainee = WanAdapter().trainee(pipeline, CALL["max_sequence_length"])
    clips = held_out(trainee, options.seeds)
    found: dict[str, bootstrap.Array] = {}
    by_name: dict[str, str] = {}
    for compressor in ("pool", "lr", *map(str, options.trained)):
        stack = packforcing(compressor=compressor)
        objective = ContextDistillation(trainee, stack, torch.nn.Module(), pipeline.scheduler, STEPS)
        by_name[stack.compressor.name] = compressor
        found[stack.compressor.name] = losses(objective, clips)
    rows = []
    for name, each in found.items():
        figures = {"distillation_loss": bootstrap.mean(each)}
        figures |= {
            f"distillation_loss / {other}'s": bootstrap.ratio(each, found[other]) for other in found if other != name
        }
        for metric, figure in figures.items():
            if figure is not None:
                rows.append(Score(name, SECONDS, metric, figure.value, figure.low, figure.high, figure.n))
                print(f"{name:6} {metric:32} {figure.value:.5f} [{figure.low:.5f}, {figure.high:.5f}]", flush=True)
    torch.set_num_threads(1)
    spent = times(options.pipeline, list(by_name.values()), options.chunks) if options.chunks else {}
    for name, source in by_name.items():
        if spent and name != "pool":
            ratio = report.median_ratio(name, "", spent[source], spent["pool"])
            rows.append(
                Score(name, SECONDS, "chunk time / pool's - 1", ratio.value - 1, ratio.low - 1, ratio.high - 1, ratio.n)
            )
            print(f"{name:6} chunk time / pool's - 1 {ratio.value - 1:.4f} [{ratio.low - 1:.4f}, {ratio.high - 1:.4f}]")
    command, commit = shlex.join(["python", "-m", "benchmarks.compressors", *sys.argv[1:]]), report.commit()
    rows = [replace(row, command=command, commit=commit) for row in rows]
    print(f"written to {report.write('compressors', rows, options.out)}")


if __name__ == "__main__":
    main()
