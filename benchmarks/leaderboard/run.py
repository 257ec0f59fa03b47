"""What the leaderboard and the ablations share: options, rollouts and measures."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.leaderboard import store, work
from benchmarks.leaderboard.bootstrap import RESAMPLES
from benchmarks.leaderboard.figures import Measured
from benchmarks.leaderboard.subjects import Memory
from benchmarks.leaderboard.tasks import Settings, Task, fingerprint
from benchmarks.report import Score
from benchmarks.toyworld import world
from kvpack.errors import KVPackError
from kvpack.shipped import shipped_folder

RUNS = report.ROOT / "runs" / "leaderboard"
SMOKE = {"seconds": 2, "captions": 1, "seeds": 1, "resamples": 20, "processes": 1}


def parser(doc: str, seconds: int, seeds: int) -> argparse.ArgumentParser:
    """Return a parser of the options that both commands have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--pipeline", type=Path, default=shipped_folder(), help="default: the shipped one")
    made.add_argument("--seconds", type=int, default=seconds, help="length of the videos, 16 frames each second")
    made.add_argument("--seeds", type=int, default=seeds, help="noise seeds of each caption")
    made.add_argument("--captions", type=int, default=len(world.HELD_OUT), help="the held-out ones first")
    made.add_argument("--steps", type=int, default=6, help="denoising steps of a chunk")
    made.add_argument("--batch", type=int, default=8, help="captions generated together; no figure depends on it")
    made.add_argument("--processes", type=int, default=1, help="of one thread each; times are kept with 1 only")
    made.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap")
    made.add_argument("--video", action="store_true", help="keep the first caption's mp4 beside each rollout")
    made.add_argument("--runs", type=Path, default=RUNS, help="folder of finished rollouts, which aren't made again")
    made.add_argument("--out", type=Path, help="folder of the figures (default: benchmarks/results)")
    made.add_argument("--smoke", action="store_true", help="two seconds of little; the figures mean nothing")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options; `--smoke` makes them small, and writes to another folder than real figures."""
    options = made.parse_args()
    if options.smoke:
        vars(options).update(SMOKE)
    options.out = options.out or (report.SMALL_RESULTS if options.smoke else report.RESULTS)
    return options


def measured(
    subjects: Sequence[Memory | str], options: argparse.Namespace, seconds: Mapping[str, int] | None = None
) -> tuple[list[Measured], dict[str, str]]:
    """Make the rollouts that are not there yet, and read all of them.

    Args:
        subjects: memories, and names of references.
        options: see `parser`.
        seconds: lengths of those whose videos have one of their own, by name.

    Returns:
        What can be measured, and what went wrong by name of the others.
    """
    own, usual = seconds or {}, int(options.seconds)
    weights, tasks, failed = fingerprint(options.pipeline), dict[str, list[Task]](), dict[str, str]()
    for subject in subjects:
        name = subject if isinstance(subject, str) else subject.name
        settings = _settings(options, own.get(name, usual))
        try:
            source = subject if isinstance(subject, str) else subject.stack()
        except KVPackError as error:
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        tasks[name] = [Task(name, source, seed, weights, settings) for seed in range(options.seeds)]
    errors = work.run([task for each in tasks.values() for task in each], options.processes)
    found = []
    for name, each in tasks.items():
        if wrong := [errors[task.folder] for task in each if task.folder in errors]:
            failed[name] = wrong[0]
        else:
            found.append(Measured(name, each[0].settings.seconds, [store.load(task.folder) for task in each]))
    for name, what in failed.items():
        report.say(f"FAILED {name}: {what}")
    return found, failed


def stamped(rows: Sequence[Score], module: str) -> list[Score]:
    """Return rows with the command that measured them."""
    command = shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])
    return [replace(row, command=command) for row in rows]


def _settings(options: Any, seconds: int) -> Settings:
    return Settings(
        pipeline=options.pipeline,
        seconds=seconds,
        captions=options.captions,
        steps=options.steps,
        batch=options.batch,
        video=options.video,
        alone=options.processes == 1,
        runs=options.runs,
    )
