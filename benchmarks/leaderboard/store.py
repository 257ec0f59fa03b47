"""Finished rollouts on disk, each a folder that is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.toyworld.world import Video
from kvpack.evaluation import Observation

ABOUT = "about.json"
# Of each chunk and video: CPU seconds, tokens attended beside the chunk, bytes allocated, bytes of archived blocks.
COSTS = ("seconds_per_chunk", "attended_tokens", "resident_bytes", "archive_bytes")


@dataclass(frozen=True, eq=False)
class Result:
    """What is kept of a rollout.

    Args:
        about: the task's facts, and the commit that made it.
        observations: one a caption.
        costs: [chunks, 4], see `COSTS`; no chunks for a reference.
        stills: pictures of the first caption by second.
    """

    about: dict[str, Any]
    observations: list[Observation]
    costs: npt.NDArray[np.float64]
    stills: dict[int, Video]


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Yield a folder that gets its name when the `with` block ends without an error."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save(folder: Path, result: Result) -> None:
    """Write a result into a folder."""
    for index, observation in enumerate(result.observations):
        observation.save(folder / f"{index:03}.npz")
    np.save(folder / "costs.npy", result.costs)
    np.savez(folder / "stills.npz", **{str(second): picture for second, picture in result.stills.items()})  # type: ignore[arg-type]
    (folder / ABOUT).write_text(json.dumps(result.about, indent=1))


def load(folder: Path) -> Result:
    """Read a result from its folder.

    Raises:
        FileNotFoundError: if it was never finished.
    """
    about = json.loads((folder / ABOUT).read_text())
    with np.load(folder / "stills.npz", allow_pickle=False) as found:
        stills = {int(second): found[second] for second in found.files}
    observations = [Observation.load(folder / f"{index:03}.npz") for index in range(about["captions"])]
    return Result(about, observations, np.load(folder / "costs.npy", allow_pickle=False), stills)
