"""Rollouts of tasks: videos are measured while they are generated, and their frames are not kept."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import report
from benchmarks.leaderboard import store
from benchmarks.leaderboard.lengths import still_frames
from benchmarks.leaderboard.sources import pieces
from benchmarks.leaderboard.tasks import Task
from benchmarks.toyworld import world
from benchmarks.toyworld.facts import facts_of
from benchmarks.toyworld.world import Video
from kvpack.evaluation import Observation, Observer
from kvpack.media.video import VideoWriter
from kvpack.pipeline.track import load_pipeline

VIDEO = "first.mp4"


def finished(task: Task) -> bool:
    """Return whether nothing of a task is left to make."""
    kept = task.folder / store.ABOUT
    return kept.exists() and (not task.settings.video or (task.folder / VIDEO).exists())


def make(task: Task) -> str:
    """Make and keep a rollout, unless it is there; return what went wrong, or an empty text."""
    if finished(task):
        return ""
    torch.set_num_threads(1)  # tensors are so small that threads would only wait for each other
    try:
        with store.writing(task.folder) as folder:
            store.save(folder, _watched(task, folder))
    except Exception as error:  # a broken variant costs its own row only
        return f"{type(error).__name__}: {error}"
    return ""


@cache
def pipeline(folder: Path) -> Any:
    """Load a pipeline, once in a process."""
    pipe = load_pipeline(folder, torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _watched(task: Task, folder: Path) -> store.Result:
    settings, pipe = task.settings, pipeline(task.settings.pipeline)
    scenes = world.first_scenes(settings.captions)
    observations: list[Observation] = []
    costs: list[npt.NDArray[np.float64]] = []
    stills: dict[int, Video] = {}
    # A reference has whole videos in memory, so it makes one at a time.
    batch = 1 if isinstance(task.source, str) else settings.batch
    for first in range(0, len(scenes), batch):
        part = scenes[first : first + batch]
        observers, spent, seen = [Observer(facts_of(scene)) for scene in part], [], 0
        with ExitStack() as kept:
            writer = _writer(task, folder, kept) if first == 0 else None
            for piece in pieces(pipe, task.source, part, first, settings.seconds, task.seed, settings.steps):
                for observer, video in zip(observers, piece.videos, strict=True):
                    observer.add(video)
                if writer is not None:
                    writer.write(piece.videos[0])
                if first == 0:
                    stills |= _stills(piece.videos[0], seen, settings.seconds)
                if piece.cost is not None:
                    spent.append(len(part) * piece.cost)
                seen += piece.videos.shape[1]
        observations += [observer.finish() for observer in observers]
        costs.append(np.array(spent).reshape(-1, len(store.COSTS)))
    about = {**task.facts(), "alone": settings.alone, "commit": report.commit()}
    return store.Result(about, observations, np.sum(costs, axis=0) / len(scenes), stills)


def _writer(task: Task, folder: Path, kept: ExitStack) -> VideoWriter | None:
    return kept.enter_context(VideoWriter(folder / VIDEO, world.FPS, upscale=4)) if task.settings.video else None


def _stills(video: Video, seen: int, seconds: int) -> dict[int, Video]:
    places = still_frames(seconds).items()
    return {second: video[at - seen].copy() for second, at in places if seen <= at < seen + len(video)}
