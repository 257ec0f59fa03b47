"""Render and encode the training clips once: the transformer trains on stored latents."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.toyworld import store, vae_full, world
from benchmarks.toyworld.chunked import FRAMES
from benchmarks.toyworld.parallel import launch

BATCH = 4


@torch.no_grad()
def encode_part(
    rank: int,
    processes: int,
    out: Path,
    vae_folder: Path,
    clips: int,
    frames: int,
    seed: int,
    rules: world.Rules,
) -> None:
    """Encode this process's share of the clips; clip i has scene i modulo the scenes and seed `seed + i`."""
    vae = AutoencoderKLWan.from_pretrained(vae_folder).eval()
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    mine, known = list(range(rank, clips, processes)), world.scenes_of(rules)
    latents = []
    for begin in range(0, len(mine), BATCH):
        made = [
            world.make_clip(known[i % len(known)], seed + i, 4 * frames - 3, rules) for i in mine[begin : begin + BATCH]
        ]
        video = torch.from_numpy(np.stack([c.video for c in made])).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        latents.append(((vae_full.encode(vae, video)[0] - mean) / std).half())
    scenes = torch.tensor([world.TRAIN.index(known[i % len(known)]) for i in mine])
    save_file({"latents": torch.cat(latents), "scenes": scenes}, out / f"latents-{rank}.safetensors")
    captions = [known[i % len(known)].caption for i in mine]  # with them it is a data folder of kvpack's own training
    (out / f"latents-{rank}.txt").write_text("\n".join(captions) + "\n")


def read(out: Path) -> tuple[Tensor, Tensor]:
    """Read normalised latents [N, 16, frames, 4, 4] in half precision, and each clip's index in `world.TRAIN`."""
    parts = [load_file(path) for path in sorted(out.glob("latents-*.safetensors"))]
    return torch.cat([p["latents"] for p in parts]), torch.cat([p["scenes"] for p in parts])


def main() -> None:
    """Encode all clips with two processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=list(world.RULES), default="lit")
    parser.add_argument("--out", type=Path, default=None, help="default: a folder of the world's name in runs/toyworld")
    parser.add_argument("--vae", type=Path, default=None, help="default: vae/ in that folder")
    parser.add_argument("--clips", type=int, default=7440)
    parser.add_argument("--frames", type=int, default=FRAMES, help="latent frames of a clip")
    parser.add_argument("--seed", type=int, default=10**7)
    parser.add_argument("--smoke", action="store_true", help="a few clips only")
    args = parser.parse_args()
    out, rules = args.out or store.RUNS / args.world, world.RULES[args.world]
    clips, processes = (2, 1) if args.smoke else (args.clips, 2)
    out.mkdir(parents=True, exist_ok=True)
    launch(encode_part, (out, args.vae or out / "vae", clips, args.frames, args.seed, rules), processes)
    latents, scenes = read(out)
    print(f"{len(scenes)} clips, latents {tuple(latents.shape)}, deviation {latents.float().std():.3f}", flush=True)


if __name__ == "__main__":
    main()
