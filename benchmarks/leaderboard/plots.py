"""Every measure over time, quality over memory, and one caption's pictures, as PNG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.leaderboard.figures import Measured
from benchmarks.leaderboard.lengths import BIN
from benchmarks.report import Score
from benchmarks.toyworld import world
from kvpack.evaluation import METRICS
from kvpack.media.contact_sheet import Row, contact_sheet
from kvpack.media.files import save_bytes

# Okabe and Ito's colours, which all kinds of colour vision tell apart; the first is of the one that matters most.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")
MOST = len(COLOURS)  # lines that can be labelled at their ends
#: What a memory costs, in what unit it is shown, and over what it is divided for that.
BUDGETS = {
    "attended_tokens": ("tokens of history attended", 1.0),
    "archive_bytes": ("compressed blocks of the video, MB", 1e6),
    "resident_bytes": ("resident memory of the video, MB", 1e6),
}
BY_BYTES = (("subject_consistency", "resident_bytes"), ("revisit_consistency", "resident_bytes"))
RECALLED = (("recall", "attended_tokens"), ("recall", "archive_bytes"))
LABEL_ROOM = 0.075  # least distance of two labels, in heights of a panel


def over_time(rows: Sequence[Score], subjects: Sequence[str], title: str) -> bytes:
    """Draw a panel for each measure: means of bins of 5 s with their 95 % intervals, each line labelled at its end.

    Args:
        rows: figures of bins.
        subjects: the one that matters most first.
        title: above all panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = Figure(figsize=(12, 7.2), layout="constrained")
    FigureCanvasAgg(page)
    page.suptitle(title, fontsize=13)
    for axes, metric in zip(page.subplots(2, 3, sharex=True).flat, METRICS, strict=True):
        ends: dict[str, float] = {}
        for index, subject in enumerate(subjects):
            colour, style = COLOURS[index % MOST], STYLES[index // MOST % len(STYLES)]
            found = sorted(
                (row for row in rows if row.subject == subject and row.metric == metric), key=lambda row: row.seconds
            )
            if not found:
                continue
            middle = [row.seconds - BIN / 2 for row in found]
            first = subject == subjects[0]
            width = 2.2 if first else 1.3
            values = [row.value for row in found]
            axes.plot(middle, values, color=colour, linestyle=style, linewidth=width, zorder=3, label=subject)
            low, high = ([getattr(row, side) for row in found] for side in ("low", "high"))
            axes.fill_between(middle, low, high, color=colour, alpha=0.15, linewidth=0)
            ends[subject] = found[-1].value
        axes.set_title(metric.replace("_", " "), fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.tick_params(labelsize=9)
        if len(subjects) <= MOST:
            _label(axes, ends, subjects)
    handles = {label: line for axes in page.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    page.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    for axes in page.axes[3:]:
        axes.set_xlabel("seconds", fontsize=10)
    return _png(page)


def over_budget(rows: Sequence[Score], seconds: int, panels: Sequence[tuple[str, str]]) -> bytes:
    """Draw measures over what a memory costs, a point for each subject; blue where no cheaper one is better.

    Args:
        rows: figures of videos.
        seconds: the length that is shown.
        panels: of each panel a measure, and a cost of `BUDGETS`; subjects without either are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = {(row.subject, row.metric): row for row in rows if row.seconds == seconds}
    page = Figure(figsize=(12, 5.4), layout="constrained")
    FigureCanvasAgg(page)
    page.suptitle(f"Quality and cost of a video at {seconds} s: means and 95 % intervals", fontsize=13)
    for axes, (metric, cost) in zip(page.subplots(1, len(panels)), panels, strict=True):
        text, unit = BUDGETS[cost]
        costs = {subject: known[subject, cost].value / unit for subject, name in known if name == cost}
        points = {each: (costs[each], known[each, metric]) for each in costs if costs[each] and (each, metric) in known}
        for subject, (spent, row) in points.items():
            best = not any(less < spent and other.value > row.value for less, other in points.values())
            colour = COLOURS[0] if subject == "packforcing" else COLOURS[1] if best else "#888888"
            interval = [[row.value - row.low], [row.high - row.value]]
            axes.errorbar(spent, row.value, yerr=interval, color=colour, fmt="o", markersize=5, elinewidth=0.8)
        axes.set_xscale("log")
        axes.set_title(metric.replace("_", " "), fontsize=11)
        axes.set_xlabel(text, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        _name(axes, {subject: (spent, row.value) for subject, (spent, row) in points.items()})
    return _png(page)


def save(path: Path, draw: Callable[[], bytes]) -> None:
    """Write a picture; without matplotlib it is left out, and said so."""
    try:
        picture = draw()
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        report.say(f"{path.name} was not drawn: matplotlib is not installed (pip install matplotlib)")
        return
    save_bytes(picture, path)


def _png(page: Any) -> bytes:
    data = BytesIO()
    page.savefig(data, format="png", dpi=130, metadata={"Software": None})
    return data.getvalue()


def _name(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Write names in a column at the right, each with a thin line to its point."""
    order = sorted(points, key=lambda name: points[name][1])
    for name, height in zip(order, np.linspace(0, 1, len(order)), strict=True):
        axes.annotate(
            name,
            points[name],
            xytext=(1.02, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.5},
            annotation_clip=False,
        )


def _label(axes: Any, ends: Mapping[str, float], subjects: Sequence[str]) -> None:
    """Write names at the ends of lines, moved apart where they would cover each other."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    places = {name: (value - low) / (high - low) for name, value in ends.items()}
    order = sorted(places, key=lambda name: places[name])
    heights = apart([places[name] for name in order], LABEL_ROOM)
    for name, height in zip(order, heights, strict=True):
        axes.annotate(
            name,
            (right, low + height * (high - low)),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=COLOURS[list(subjects).index(name)],
            annotation_clip=False,
        )


def apart(places: Sequence[float], room: float) -> list[float]:
    """Move sorted places until neighbours are `room` apart, without moving their mean.

    >>> apart([0.5, 0.5], 0.25)
    [0.375, 0.625]
    """
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + room) if moved else place)
    shift = float(np.mean(np.subtract(moved, places))) if moved else 0.0
    return [place - shift for place in moved]


def sheet(measured: Sequence[Measured]) -> bytes:
    """Draw the first caption's pictures, a row for each subject; white where its video has ended."""
    seconds = sorted({second for each in measured for second in each.results[0].stills})
    white = np.full((world.SIZE, world.SIZE, 3), 255, np.uint8)
    rows = [Row(each.name, [each.results[0].stills.get(second, white) for second in seconds]) for each in measured]
    return contact_sheet(f'"{world.HELD_OUT[0].caption}", seed 0', [f"{second} s" for second in seconds], rows, side=96)
