"""Train the chunk-causal transformer and its text encoder on stored latents."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.toyworld import chunked, encode, export, store, text, world
from benchmarks.toyworld.optim import Muon, anneal, set_rate
from benchmarks.toyworld.parallel import average_gradients, launch

EMA = 0.997
DROP = 0.05
SHIFT = 4.0
TOLD, UNTOLD = 0.2, 0.05


@dataclass(frozen=True)
class Options:
    """Options of one training run."""

    out: Path
    minutes: float
    seed: int = 0
    rate: float = 3e-3
    clips: int = 2  # a step in each process
    copies: tuple[int, ...] = (3, 2, 2, 2, 3)  # the first chunk is the hardest, the last has most to remember
    steps: int = 10**9
    compiled: bool = True
    every: float = 120.0  # seconds between checkpoints
    export_every: float = 480.0
    start: Path | None = None  # a checkpoint whose averaged weights it begins with


def captions() -> tuple[Tensor, Tensor]:
    """Return token ids [N + 1, 8] and real lengths of the training captions; the last is the empty one."""
    said = [scene.caption for scene in world.TRAIN] + [""]
    made = text.build_tokenizer()(said, padding="max_length", max_length=text.CAPTION_TOKENS, return_tensors="pt")
    return made["input_ids"], made["attention_mask"].sum(1)


def noise_levels(batch: int, layout: chunked.Layout) -> Tensor:
    """Draw the sigma of every noisy group [B, groups], stratified over the copies of a chunk."""
    levels = []
    for many in layout.copies:
        strata = torch.rand(batch, many).argsort(1)
        u = (strata + torch.rand(batch, many)) / many
        levels.append(SHIFT * u / (1 + (SHIFT - 1) * u))
    return torch.cat(levels, 1)


def prepare(latents: Tensor, layout: chunked.Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens and times of all groups, and the velocities to learn of the noisy ones."""
    batch, chunks = latents.shape[0], chunked.group(latents)
    x = chunks[:, layout.chunk_of]
    noise = torch.randn_like(x)
    sigma = torch.empty(batch, len(layout.chunk_of))
    sigma[:, layout.noisy] = noise_levels(batch, layout)
    past = (batch, len(layout.clean))
    sigma[:, layout.clean] = TOLD * torch.rand(past) * (torch.rand(past) < 0.5)
    s = sigma[..., None, None]
    tokens = (1 - s) * x + s * noise
    tokens[:, layout.clean] += UNTOLD * torch.randn_like(tokens[:, layout.clean])
    return tokens, 1000 * sigma, (noise - x)[:, layout.noisy]


class Trainee(nn.Module):
    """The transformer and its text encoder, trained together."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.model, self.encoder = chunked.build(), text.build_encoder()
        self.grouped = [chunked.ChunkedForward(self.model, options.copies, options.compiled)]
        self.ids, self.real = captions()

    def loss(self, latents: Tensor, scenes: Tensor) -> Tensor:
        """Return the velocity loss; some captions are dropped, all are padded to random lengths up to 512."""
        dropped = torch.rand(scenes.shape) < DROP
        scenes = torch.where(dropped, len(world.TRAIN), scenes)
        ids, real = self.ids[scenes], self.real[scenes]
        words = self.encoder(ids, (ids != 0).long()).last_hidden_state
        length = (text.CAPTION_TOKENS + 1) * (512 / (text.CAPTION_TOKENS + 1)) ** torch.rand(scenes.shape)
        tokens, t, target = prepare(latents, self.grouped[0].layout)
        return F.mse_loss(self.grouped[0](tokens, t, words, real, length.round()), target)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return both state dicts."""
        return {"model": self.model.state_dict(), "encoder": self.encoder.state_dict()}

    def load_weights(self, weights: dict[str, dict[str, Tensor]]) -> None:
        """Load what `weights` returned."""
        self.model.load_state_dict(weights["model"])
        self.encoder.load_state_dict(weights["encoder"])


def optimisers_of(trainee: Trainee, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for everything else."""
    matrices = [p for p in trainee.model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trainee.parameters() if id(p) not in chosen]
    return [Muon(matrices, rate), torch.optim.AdamW(rest, rate * 2 / 3, (0.9, 0.98), weight_decay=0.0)]


def train(rank: int, world_size: int, options: Options) -> None:
    """Run one process of the training."""
    torch.manual_seed(options.seed)
    trainee, path = Trainee(options), options.out / "transformer.pt"
    optimisers, params = optimisers_of(trainee, options.rate), list(trainee.parameters())
    step, elapsed = 0, 0.0
    if options.start is not None:
        trainee.load_weights(store.weights(options.start)["ema"])
    ema = {part: {k: v.clone() for k, v in state.items()} for part, state in trainee.weights().items()}
    if (state := store.load(path)) is not None:
        trainee.load_weights(state["weights"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        ema, step, elapsed = state["ema"], state["step"], state["elapsed"]
    latents, scenes = encode.read(options.out)
    torch.manual_seed(options.seed + 1000 * step + rank)
    start = time.monotonic() - elapsed
    saved_at = exported_at = time.monotonic()
    progress, recent = elapsed / (60 * options.minutes), float("nan")

    def checkpoint() -> dict[str, Any]:
        saved = [optimiser.state_dict() for optimiser in optimisers]
        spent = time.monotonic() - start
        return {"weights": trainee.weights(), "ema": ema, "optimisers": saved, "step": step, "elapsed": spent}

    while progress < 1 and step < options.steps:
        set_rate(optimisers, anneal(progress))
        pick = torch.randint(len(scenes), (options.clips,))
        loss = trainee.loss(latents[pick].float(), scenes[pick])
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        progress = average_gradients(params, (time.monotonic() - start) / (60 * options.minutes))
        nn.utils.clip_grad_norm_(params, 1.0)
        for optimiser in optimisers:
            optimiser.step()
        step += 1
        decay = min(EMA, (1 + step) / (10 + step))
        now = float(loss.detach())
        recent = now if math.isnan(recent) else recent + 0.01 * (now - recent)
        with torch.no_grad():
            for part, weights in trainee.weights().items():
                torch._foreach_lerp_(list(ema[part].values()), list(weights.values()), 1 - decay)
        if rank == 0 and step % 100 == 0:
            spent = time.monotonic() - start
            print(f"step {step} progress {progress:.3f} loss {recent:.4f} seconds {spent:.0f}", flush=True)
        if rank == 0 and time.monotonic() - saved_at > options.every:
            store.save(path, checkpoint())
            saved_at = time.monotonic()
        if rank == 0 and time.monotonic() - exported_at > options.export_every:
            store.save(path, checkpoint())
            export.write(options.out / "pipeline", *export.parts(options.out))
            exported_at = time.monotonic()
    if rank == 0:
        store.save(path, checkpoint())


def main() -> None:
    """Train, or go on from a checkpoint, then export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=list(world.RULES), default="lit")
    parser.add_argument("--out", type=Path, default=None, help="default: a folder of the world's name in runs/toyworld")
    parser.add_argument("--start", type=Path, default=None, help="a checkpoint to begin with")
    parser.add_argument("--minutes", type=float, default=53.0)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    args = parser.parse_args()
    out, compiled = args.out or store.RUNS / args.world, not args.eager
    options = Options(out, args.minutes, args.seed, args.rate, args.clips, compiled=compiled, start=args.start)
    if args.smoke:
        options = replace(options, minutes=1.0, clips=1, steps=2, compiled=False)
    launch(train, (options,), 1 if args.smoke else args.processes)
    export.write(out / "pipeline", *export.parts(out))


if __name__ == "__main__":
    main()
