"""Training by a loss that looks where the middle matters, and its measure on clips that were held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.leaderboard import bootstrap
from benchmarks.trained.bank import FIRST, FRAMES, Bank, History, Toy
from benchmarks.trained.students import Student
from kvpack.training.noise import generator, mixed

#: Chunks that are learned from; before them hardly anything is compressed.
LEARNED = FIRST + 2
MEASURED = (8, 10, 12, 14, 16, 18)


@dataclass(frozen=True)
class Recipe:
    """How a student is trained.

    Args:
        steps: of AdamW, on a cosine schedule.
        batch: chunks of a step, all with the same number of blocks.
        rate: learning rate.
        weighted: whether samples and tokens count by how much the middle matters there; else all alike.
        seed: of the samples and the noise of choices.
    """

    steps: int = 100
    batch: int = 16
    rate: float = 3e-3
    weighted: bool = True
    seed: int = 0


def errors(toy: Toy, bank: Bank, student: Student | None, clips: Tensor, chunk: int) -> Tensor:
    """Return squared differences to what is wanted of a chunk of some clips, `[clips, frames, rows, columns]`."""
    if student is not None:
        student.begin(toy, bank, clips, chunk)
    layers = [
        History(
            toy,
            bank.ends(layer, clips, chunk),
            None if student is None else student.middle(layer, *bank.middle(layer, clips, chunk)),
        )
        for layer in range(toy.geometry.layers)
    ]
    clean = bank.latents[clips][:, :, FRAMES * chunk : FRAMES * (chunk + 1)].float()
    noisy = mixed(clean, bank.noise[clips, chunk].float(), toy.sigma)
    velocity = toy.forward(noisy, toy.timestep, bank.embeds[clips], layers)
    return (velocity - bank.wanted[clips, chunk].float()).square().mean(dim=1)


def trained(toy: Toy, bank: Bank, student: Student, recipe: Recipe) -> None:
    """Train a student on all clips of a bank."""
    torch.manual_seed(recipe.seed)
    source, worth = generator(recipe.seed), bank.worth
    weights = [each for each in student.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(weights, recipe.rate, weight_decay=0.02)
    told: list[float] = []
    student.train()
    for step in range(recipe.steps):
        clips, chunk = _drawn(worth if recipe.weighted else torch.ones_like(worth), recipe.batch, source)
        wrong = errors(toy, bank, student, clips, chunk)
        here = worth[clips, chunk] if recipe.weighted else torch.ones_like(wrong)
        loss = (here * wrong).sum() / (here * worth[clips, chunk]).sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.param_groups[0]["lr"] = recipe.rate * min(1, (step + 1) / 20) * _cosine(step / recipe.steps)
        optimiser.step()
        told.append(float(loss.detach()))
        if (step + 1) % 25 == 0:
            print(f"step {step + 1}: {np.mean(told[-25:]):.3f} of what the middle is worth is lost", flush=True)
    student.eval()


def _cosine(done: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * done)


def _drawn(worth: Tensor, batch: int, source: torch.Generator) -> tuple[Tensor, int]:
    """Draw a chunk, and clips, as often as the middle matters there."""
    each = worth[:, LEARNED:].mean(dim=(2, 3, 4))  # (clips, chunks)
    chunk = int(torch.multinomial(each.sum(dim=0), 1, generator=source))
    return torch.multinomial(each[:, chunk], min(batch, len(each)), generator=source), LEARNED + chunk


@torch.no_grad()
def lost(toy: Toy, bank: Bank, student: Student | None, chunks: Sequence[int] = MEASURED) -> bootstrap.Interval:
    """Return the share of what the middle is worth that is lost behind a student, weighted by that worth.

    0 is the prediction behind whole blocks, 1 that behind no middle. Low and high are a 95 % bootstrap over clips.
    """
    if student is not None:
        student.eval()
    worth, every = bank.worth, torch.arange(len(bank.latents))
    above, below = np.zeros((len(every), 1)), np.zeros((len(every), 1))
    for chunk in chunks:
        here = worth[:, chunk]
        above[:, 0] += (here * errors(toy, bank, student, every, chunk)).sum(dim=(1, 2, 3)).numpy()
        below[:, 0] += here.square().sum(dim=(1, 2, 3)).numpy()
    found = bootstrap.ratio(above, below)
    assert found is not None
    return found
