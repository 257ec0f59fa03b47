"""A picture of when each wall of a video was lit, and in what colour."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np

from benchmarks.leaderboard.figures import Measured
from benchmarks.toyworld import world
from benchmarks.toyworld.world import Array
from kvpack.evaluation import Observation


def lanes(observation: Observation, walls: int) -> Array:
    """Return a lane for each wall, [walls, T, 3] in 0..1: its colour while it is lit, near white otherwise."""
    on = observation.landmark_on[:, :walls, None]
    return np.where(on, observation.landmark_colour[:, :walls], 0.95).transpose(1, 0, 2).astype(np.float32)


def timeline(measured: Sequence[Measured], title: str) -> bytes:
    """Draw a panel for each subject, of the first caption and seed; a wall that keeps its colour was remembered."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = Figure(figsize=(12, 0.6 + 0.95 * len(measured)), layout="constrained")
    FigureCanvasAgg(page)
    page.suptitle(title, fontsize=13)
    longest = max(each.seconds for each in measured)
    for axes, each in zip(page.subplots(len(measured), 1, sharex=True, squeeze=False).flat, measured, strict=True):
        picture = lanes(each.results[0].observations[0], len(world.WALLS))
        end = picture.shape[1] / world.FPS
        axes.imshow(picture, aspect="auto", interpolation="nearest", extent=(0, end, len(picture) - 0.5, -0.5))
        axes.set_xlim(0, longest)
        axes.set_yticks(range(len(world.WALLS)), world.WALLS, fontsize=7)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
        axes.set_title(each.name, fontsize=10, loc="left", pad=2)
    page.axes[-1].set_xlabel("seconds", fontsize=10)
    data = BytesIO()
    page.savefig(data, format="png", dpi=130, metadata={"Software": None})
    return data.getvalue()
