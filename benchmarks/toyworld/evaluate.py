"""The training gate: five-second clips of the held-out captions by stock models, measured beside the ceiling."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline

from benchmarks.baselines import through_vae
from benchmarks.toyworld import chunked, sampler, store, world
from benchmarks.toyworld.facts import facts_of
from benchmarks.toyworld.world import Scene, Video
from kvpack.evaluation import Observation, Observer, measures
from kvpack.evaluation.measures import OTHER_COLOUR
from kvpack.evaluation.motion import paths

ERROR = "position error, px"
Row = dict[str, float]


def judge(video: Video, scene: Scene) -> Row:
    """Return the gate's measures of one video [T, H, W, 3], then the public ones."""
    observer = Observer(facts_of(scene))
    observer.add(video)
    seen = observer.finish()
    colour, shape, background = seen.checks.mean(0)
    residual, _ = paths(seen.centre, seen.fps)
    return {
        "visible": float(seen.visible.mean()),
        "colour": float(colour),
        "shape": float(shape),
        "clips right": float((seen.checks[:, :2].all(1)).mean() > 0.5),
        "background": float(background),
        ERROR: float(np.median(residual)) * world.SIZE if len(residual) else float("nan"),
        "one wall lit": float((seen.landmark_on.sum(1) == 1).mean()),
        "lamp colour": lamp_colour(seen),
        **measures(seen, 0, seen.frames),
    }


def lamp_colour(seen: Observation) -> float:
    """Return how near lit walls are to a colour that a lamp can have, in 0..1 as in `revisit_consistency`."""
    lit = seen.landmark_colour[seen.landmark_on]
    known = np.array([world.COLOURS[name] for name in world.LAMPS], np.float32)
    distance = np.sqrt(((lit[:, None] - known) ** 2).sum(-1)).min(1)
    return float((1 - np.minimum(1, distance / OTHER_COLOUR)).mean()) if len(lit) else float("nan")


def ceiling(pipe: WanPipeline, scene: Scene, seed: int, frames: int) -> Row:
    """Return the measures of the truth through the VAE, and the VAE's PSNR in dB."""
    truth = world.make_clip(scene, seed, frames).video
    decoded = through_vae(pipe.vae, truth)
    error = ((truth.astype(np.float64) - decoded) / 255) ** 2
    return {**judge(decoded, scene), "PSNR, dB": float(-10 * np.log10(max(error.mean(), 1e-10)))}


def table(rows: dict[str, list[Row]]) -> str:
    """Return a Markdown table, a line for each measure and a column for each kind of video."""
    names = list(dict.fromkeys(name for part in rows.values() for row in part for name in row))
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for name in names:
        found = [_middle(name, [row[name] for row in part if name in row]) for part in rows.values()]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _middle(name: str, values: list[float]) -> str:
    known = [value for value in values if not np.isnan(value)]
    return f"{(np.median if name == ERROR else np.mean)(known):.3f}" if known else ""


def sampled(
    pipe: WanPipeline, scenes: list[Scene], frames: int, seed: int, steps: int, text_length: int
) -> Iterator[Video]:
    """Sample one video of `frames` latent frames for each scene, by the reference sampler."""
    latents = sampler.sample(pipe, [scene.caption for scene in scenes], frames, seed, steps, text_length)
    for each in latents.split(1):  # of long videos one fits into memory
        yield sampler.decode(pipe, each)[0].numpy()


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=store.RUNS / "lit" / "pipeline")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=chunked.FRAMES, help="latent frames")
    parser.add_argument("--text-length", type=int, default=16)
    parser.add_argument("--trained", action="store_true", help="captions seen in training, as many as are held out")
    parser.add_argument("--smoke", action="store_true", help="one caption, one chunk")
    args = parser.parse_args()
    count = len(world.HELD_OUT)
    scenes = list(world.TRAIN[:: len(world.TRAIN) // count][:count] if args.trained else world.HELD_OUT)
    seeds, frames = range(args.seeds), args.frames
    if args.smoke:
        scenes, seeds, frames = scenes[:1], range(1), chunked.CHUNK
    pipe = WanPipeline.from_pretrained(args.pipeline)
    rows: dict[str, list[Row]] = {"sampled": [], "truth through the VAE": []}
    for seed in seeds:
        videos = sampled(pipe, scenes, frames, seed, args.steps, args.text_length)
        for index, (video, scene) in enumerate(zip(videos, scenes, strict=True)):
            rows["sampled"].append(judge(video, scene))
            rows["truth through the VAE"].append(ceiling(pipe, scene, 1000 * seed + index, len(video)))
    pixels = 4 * frames - 3
    print(f"{len(scenes)} captions x {len(seeds)} seeds, {pixels} frames, {args.steps} steps")
    print(table(rows))


if __name__ == "__main__":
    with torch.no_grad():
        main()
