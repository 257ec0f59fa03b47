"""Train what stands for compressed blocks by a loss that looks where the middle matters, and measure what it recalls.

`lost`: of held-out clips of the toy world, the share of what the middle is worth to the prediction that is lost behind
a student: 0 behind the four whole blocks of largest mass, 1 behind sink and recent chunk alone; weighted by that worth,
with 95 % bootstrap intervals over clips. `recall`, `recall_events` and others are those of the leaderboard, of videos
that are generated with the student as compressor; all attend 224 tokens. Low and high as there.

Figures go to benchmarks/results/trained.json; with --variants only theirs are replaced.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import report
from benchmarks.leaderboard import bootstrap, figures, run
from benchmarks.leaderboard.figures import Measured
from benchmarks.report import Score
from benchmarks.trained import bank as banks
from benchmarks.trained.bank import Bank, Toy
from benchmarks.trained.learning import Recipe, lost, trained
from benchmarks.trained.policies import WEIGHTS, TrainedKeep
from benchmarks.trained.students import Hybrid, Kept, Student, Twins
from kvpack import memory
from kvpack.policies import FarthestCompressor, packforcing
from kvpack.policies.dual import trained_compressor
from kvpack.policies.keep_random import RandomTokensCompressor

NAME, FRAMES, SECONDS = "trained", 80, 20
CLIPS, HELD_OUT = 448, 96
COUNTED = ("recall", "recall_events", "subject_consistency", "dynamic_degree", "attended_tokens", "archive_bytes")
SEEDS = (60_000_000, 50_000_000)  # of the clips that are learned from, and of those that are held out


@dataclass(frozen=True)
class Variant:
    """What is trained, or compared with it.

    Args:
        name: what tables call it.
        student: makes it.
        recipe: how it is trained; None if nothing of it is.
        compressor: makes what stands for a block in a rollout, of the folder with the weights.
    """

    name: str
    student: Callable[[], Student]
    recipe: Recipe | None
    compressor: Callable[[str], Any]

    def stack(self, folder: Path) -> memory.Memory:
        """Return the memory that the student is part of; it takes 32 tokens of the middle."""
        topk = self.student().topk
        return packforcing(compressor=self.compressor(str(folder)), topk=topk, train_frames=20)


_UNTRAINED = {"farthest": FarthestCompressor, "random": RandomTokensCompressor}


def _kept(name: str, tokens: int, topk: int, how: str, recipe: Recipe | None = None) -> Variant:
    return Variant(
        f"{name}, {tokens} tokens of {topk} blocks",
        lambda: Kept(tokens, topk, how),
        recipe,
        lambda folder: (
            _UNTRAINED[how](keep_tokens=tokens)
            if recipe is None
            else TrainedKeep(weights=folder, how=how, keep_tokens=tokens)
        ),
    )


def _hybrid(tokens: int, summaries: int, topk: int) -> Variant:
    return Variant(
        f"{tokens} farthest and {summaries} learned, {topk} blocks",
        lambda: Hybrid(tokens, summaries, topk),
        Recipe(rate=2e-3),
        lambda folder: TrainedKeep(weights=folder, how="hybrid", keep_tokens=tokens + summaries, summaries=summaries),
    )


def _twins(name: str, hidden: int, recipe: Recipe) -> Variant:
    return Variant(name, lambda: Twins(hidden, 16), recipe, trained_compressor)


VARIANTS = (
    _kept("farthest", 8, 4, "farthest"),
    _kept("farthest", 4, 8, "farthest"),
    _kept("farthest", 2, 16, "farthest"),
    _kept("random", 8, 4, "random"),
    _kept("learned offset", 8, 4, "offset", Recipe()),
    _kept("learned offset", 4, 8, "offset", Recipe()),
    _kept("learned score", 8, 4, "score", Recipe()),
    _hybrid(7, 1, 4),
    _hybrid(3, 1, 8),
    _twins("hr, unweighted", 64, Recipe(rate=2e-3, weighted=False)),
    _twins("hr, weighted", 64, Recipe(rate=2e-3)),
    _twins("hr of 128 channels, weighted", 128, Recipe(rate=2e-3)),
)


def bank_of(toy: Toy, path: Path, clips: int, seed: int) -> Bank:
    """Return a bank of rendered clips, which is kept in a file."""
    if not path.exists():
        made = banks.made(toy, banks.rendered(toy, clips, FRAMES, seed), seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: _stacked(each) for name, each in vars(made).items()}, path)
    held = load_file(path)
    return Bank(**{name: list(each) if name in ("keys", "values") else each for name, each in held.items()})  # type: ignore[arg-type]


def _stacked(each: Any) -> torch.Tensor:
    return torch.stack(each) if isinstance(each, list) else each.contiguous()


def learned(variant: Variant, toy: Toy, bank: Bank, folder: Path) -> Student:
    """Return a variant's student, trained unless its weights are there."""
    torch.manual_seed(0)
    student = variant.student()
    if isinstance(student, Kept | Hybrid) and student.features is not None:
        student.features.scale(bank)
    path = folder / WEIGHTS
    saved = student.branch if isinstance(student, Twins) else student
    if path.exists():
        saved.load_state_dict(load_file(path))
        return student
    if variant.recipe is not None:
        report.say(f"training {variant.name}")
        trained(toy, bank, student, variant.recipe)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(student, Twins):
        student.branch.save_pretrained(folder)
    else:
        save_file({name: each.contiguous() for name, each in student.state_dict().items()}, path)
    return student


def scores(found: Sequence[Measured], resamples: int) -> list[Score]:
    """Return what counts here of each subject's whole videos, and its differences to the first."""
    rows = [row for each in found for row in figures.scores(each, None, resamples)]
    for each in found[1:]:
        rows += figures.differences(each, found[0], resamples)
    return [row for row in rows if row.seconds == found[0].seconds and row.metric in COUNTED]


def main() -> int:
    """Run the command line."""
    parser = run.parser(__doc__ or "", 120, 1)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [each.name for each in VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="VARIANT", help=", ".join(names))
    parser.add_argument("--work", type=Path, default=report.ROOT / "runs" / NAME, help="folder of banks and weights")
    parser.add_argument("--clips", type=int, default=CLIPS, help="of 80 latent frames, that are learned from")
    parser.add_argument("--no-rollouts", action="store_true", help="train and measure on held-out clips only")
    options = run.parsed(parser)
    if options.smoke:
        options.work = options.out / NAME
    torch.set_num_threads(1)
    toy, rows = Toy(), list[Score]()
    held_out = bank_of(toy, options.work / "held-out.safetensors", 2 if options.smoke else HELD_OUT, SEEDS[1])
    bank = bank_of(toy, options.work / "bank.safetensors", 2 if options.smoke else options.clips, SEEDS[0])
    chosen = [each for each in VARIANTS if each.name in options.variants]
    for each in chosen:
        recipe = each.recipe and (replace(each.recipe, steps=1) if options.smoke else each.recipe)
        student = learned(replace(each, recipe=recipe), toy, bank, options.work / _slug(each.name))
        share = lost(toy, held_out, student)
        rows.append(_row(each.name, share))
        print(f"{each.name:40} lost {share.value:.3f} [{share.low:.3f}, {share.high:.3f}]", flush=True)
    if not options.no_rollouts:
        subjects = [_Named(each.name, each.stack(options.work / _slug(each.name))) for each in chosen]
        found, _ = run.measured(subjects, options)  # type: ignore[arg-type]
        rows += scores(found, options.resamples)
    rows = report.merged(options.out / f"{NAME}.json", run.stamped(rows, NAME))
    print(f"written to {report.write(NAME, rows, options.out)}")
    return 0


@dataclass(frozen=True)
class _Named:
    name: str
    made: memory.Memory

    def stack(self) -> memory.Memory:
        return self.made


def _row(name: str, share: bootstrap.Interval) -> Score:
    return Score(name, SECONDS, "lost", share.value, share.low, share.high, share.n)


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
