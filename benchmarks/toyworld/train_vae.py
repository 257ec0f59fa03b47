"""Train the tiny VAE: mixed lengths from 5 to 81 frames, because a VAE drifts on lengths it never saw."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from benchmarks.toyworld import store, vae_full, world
from benchmarks.toyworld.optim import Muon, anneal, set_rate
from benchmarks.toyworld.parallel import average_gradients, launch

LENGTHS = (5, 17, 41, 81)
EARLY, LATE = (0.3, 0.3, 0.2, 0.2), (0.2, 0.2, 0.2, 0.4)
KL = 1e-4
BRIGHT = 5.0  # how much more what is bright counts


@dataclass(frozen=True)
class Options:
    """Options of one training run."""

    out: Path
    minutes: float
    seed: int = 0
    rate: float = 6e-3
    pixels: int = 90  # frames a step in each process
    steps: int = 10**9
    every: float = 120.0  # seconds between checkpoints
    rules: world.Rules = world.LIT
    start: Path | None = None  # a checkpoint whose weights it begins with

    @property
    def checkpoint(self) -> Path:
        """Return the path of this training's checkpoint."""
        return self.out / "vae.pt"


def batch(rng: np.random.Generator, frames: int, clips: int, rules: world.Rules) -> tuple[Tensor, Tensor]:
    """Render a video batch [B, 3, T, H, W] in -1..1 and the mask of what is bright in it [B, 1, T, H, W]."""
    scenes = world.scenes_of(rules)
    made = [
        world.make_clip(scenes[rng.integers(len(scenes))], int(rng.integers(2**31)), frames, rules)
        for _ in range(clips)
    ]
    video = torch.from_numpy(np.stack([c.video for c in made])).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    return video, torch.from_numpy(np.stack([c.bright for c in made]))[:, None].float()


def loss_of(vae: AutoencoderKLWan, video: Tensor, mask: Tensor) -> Tensor:
    """Return L1, six times as heavy on the object and on a lit wall, plus KL."""
    mean, log_variance = vae_full.encode(vae, video)
    latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    error = (vae_full.decode(vae, latents) - video).abs()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return (error * (1 + BRIGHT * mask)).mean() + KL * kl


@torch.no_grad()
def psnr(
    vae: AutoencoderKLWan, frames: int, clips: int, rules: world.Rules = world.LIT, seed: int = 10**6
) -> list[float]:
    """Return the PSNR in dB of stock encode and decode on held-out scenes: whole clips, and their last 17 frames."""
    errors = []
    scenes = [scene for scene in world.HELD_OUT if scene.colour in rules.colours]
    for index in range(clips):
        clip = world.make_clip(scenes[index % len(scenes)], seed + index, frames, rules)
        video = torch.from_numpy(clip.video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        out = vae.decode(vae.encode(video).latent_dist.mode()).sample
        errors.append(((out - video) / 2).square().mean(dim=(0, 1, 3, 4)))
    error = torch.stack(errors)
    return [float(-10 * e.mean().log10()) for e in (error, error[:, -17:])]


@torch.no_grad()
def moments(
    vae: AutoencoderKLWan, clips: int, rules: world.Rules, seed: int = 2 * 10**6
) -> tuple[list[float], list[float]]:
    """Return mean and deviation of each latent channel; the posterior's variance counts, or empty channels blow up."""
    rng = np.random.default_rng(seed)
    means, variances = [], []
    for _ in range(clips):
        mean, log_variance = vae_full.encode(vae, batch(rng, world.FRAMES, 1, rules)[0])
        means.append(mean.transpose(0, 1).flatten(1))
        variances.append(log_variance.exp().transpose(0, 1).flatten(1))
    mean, variance = torch.cat(means, 1), torch.cat(variances, 1)
    return mean.mean(1).tolist(), (mean.var(1) + variance.mean(1)).sqrt().tolist()


def finish(vae: AutoencoderKLWan, out: Path, clips: int, rules: world.Rules) -> None:
    """Write the VAE as diffusers does, with the moments that the pipeline needs, and print the gate."""
    mean, std = moments(vae, clips, rules)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(out / "vae")
    print("latents_std", [round(s, 2) for s in std], flush=True)
    for frames, count in ((17, clips), (77, clips), (81, clips), (481, clips // 6)):
        if not count:  # a smoke run has no clip for the longest
            continue
        whole, last = psnr(vae, frames, count, rules)
        print(f"psnr {frames:4d} frames {whole:.2f} dB, last 17 {last:.2f} dB", flush=True)


def train(rank: int, world_size: int, options: Options) -> None:
    """Run one process of the training."""
    torch.manual_seed(options.seed)
    vae = vae_full.build().train()
    matrices = [p for p in vae.parameters() if p.ndim >= 4 and p.shape[0] > 1 and p.numel() > p.shape[0]]
    chosen = {id(p) for p in matrices}
    rest = [p for p in vae.parameters() if id(p) not in chosen]
    params = matrices + rest
    optimisers = [
        Muon(matrices, options.rate),
        torch.optim.AdamW(rest, options.rate / 2, (0.9, 0.98), weight_decay=0.0),
    ]
    step, elapsed, path = 0, 0.0, options.checkpoint
    if (state := store.load(path)) is not None:
        vae.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step, elapsed = state["step"], state["elapsed"]
    elif options.start is not None:
        vae.load_state_dict(store.weights(options.start)["model"])
    torch.manual_seed(options.seed + 1000 * step + rank)
    shared, own = np.random.default_rng([options.seed, step]), np.random.default_rng([options.seed, step, rank])
    start, saved_at, recent = time.monotonic() - elapsed, time.monotonic(), float("nan")
    progress = elapsed / (60 * options.minutes)
    while progress < 1 and step < options.steps:
        set_rate(optimisers, anneal(progress))
        frames = int(shared.choice(LENGTHS, p=EARLY if progress < 0.5 else LATE))
        video, bright = batch(own, frames, max(1, options.pixels // frames), options.rules)
        loss = loss_of(vae, video, bright)
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        progress = average_gradients(params, (time.monotonic() - start) / (60 * options.minutes))
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimiser in optimisers:
            optimiser.step()
        step += 1
        now = float(loss.detach())
        recent = now if math.isnan(recent) else recent + 0.02 * (now - recent)
        if rank == 0 and step % 50 == 0:
            print(f"step {step} progress {progress:.3f} loss {recent:.4f}", flush=True)
        if rank == 0 and (time.monotonic() - saved_at > options.every):
            _save(path, vae, optimisers, step, time.monotonic() - start)
            saved_at = time.monotonic()
    if rank == 0:
        _save(path, vae, optimisers, step, time.monotonic() - start)


def _save(
    path: Path, vae: AutoencoderKLWan, optimisers: list[torch.optim.Optimizer], step: int, elapsed: float
) -> None:
    saved = [optimiser.state_dict() for optimiser in optimisers]
    store.save(path, {"model": vae.state_dict(), "optimisers": saved, "step": step, "elapsed": elapsed})


def main() -> None:
    """Train, or go on from a checkpoint, then write the VAE and its gate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=list(world.RULES), default="lit")
    parser.add_argument("--out", type=Path, default=None, help="default: a folder of the world's name in runs/toyworld")
    parser.add_argument("--start", type=Path, default=None, help="a checkpoint to begin with")
    parser.add_argument("--minutes", type=float, default=26.0)
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    args = parser.parse_args()
    out, rules = args.out or store.RUNS / args.world, world.RULES[args.world]
    options = Options(out, args.minutes, args.seed, args.rate, steps=args.steps, rules=rules, start=args.start)
    if args.smoke:
        options = replace(options, minutes=1.0, pixels=5, steps=2)
    launch(train, (options,), 1 if args.smoke else args.processes)
    vae = vae_full.build()
    vae.load_state_dict(store.weights(options.checkpoint)["model"])
    finish(vae.eval(), out, 1 if args.smoke else 12, rules)


if __name__ == "__main__":
    main()
