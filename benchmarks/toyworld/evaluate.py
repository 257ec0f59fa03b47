"""Sample five-second clips of the held-out captions with stock models and print the measures beside the ceiling."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from torch import Tensor

from benchmarks.toyworld import chunked, measure, sampler, store, world


def through_vae(pipe: WanPipeline, scenes: list[world.Scene], seed: int, frames: int) -> Tensor:
    """Ground truth, encoded and decoded: what no generator behind this VAE can beat."""
    made = np.stack([world.make_clip(scene, seed + i, frames).video for i, scene in enumerate(scenes)])
    video = torch.from_numpy(made).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        out = torch.cat([pipe.vae.decode(pipe.vae.encode(v).latent_dist.mode()).sample for v in video.split(1)])
    return ((out / 2 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


def judge(videos: Tensor, scenes: list[world.Scene], begin: int = 0) -> list[measure.Summary]:
    """The measures of each video, from one frame on."""
    return [measure.summarise(v.numpy()[begin:], s) for v, s in zip(videos, scenes, strict=True)]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=store.RUNS / "pipeline")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=chunked.FRAMES, help="latent frames")
    parser.add_argument("--text-length", type=int, default=16)
    parser.add_argument("--trained", action="store_true", help="captions seen in training, as many as are held out")
    parser.add_argument("--smoke", action="store_true", help="one caption, one chunk")
    args = parser.parse_args()
    scenes = list(world.TRAIN[:: len(world.TRAIN) // 10][:10] if args.trained else world.HELD_OUT)
    seeds, frames = range(args.seeds), args.frames
    if args.smoke:
        scenes, seeds, frames = scenes[:1], range(1), chunked.CHUNK
    pipe = WanPipeline.from_pretrained(args.pipeline)
    rows: dict[str, list[measure.Summary]] = {
        "sampled": [],
        "sampled, after 24 frames": [],
        "truth through the VAE": [],
    }
    for seed in seeds:
        latents = sampler.sample(pipe, [s.caption for s in scenes], frames, seed, args.steps, args.text_length)
        videos = sampler.decode(pipe, latents)
        rows["sampled"] += judge(videos, scenes)
        if not args.smoke:
            rows["sampled, after 24 frames"] += judge(videos, scenes, measure.WINDOW)
        rows["truth through the VAE"] += judge(through_vae(pipe, scenes, 1000 * seed, 4 * frames - 3), scenes)
    print(f"{len(scenes)} captions x {len(seeds)} seeds, {4 * frames - 3} frames, Euler {args.steps} steps")
    print(measure.table({name: measure.average(part) for name, part in rows.items() if part}))


if __name__ == "__main__":
    main()
