"""95 % bootstrap intervals of means: captions are resampled, and within each its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.report import SEED

Array = npt.NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A figure, its 95 % interval, and the number of videos that have it."""

    value: float
    low: float
    high: float
    n: int


def means(values: Array, resamples: int = RESAMPLES) -> Array:
    """Return means of resamples, [resamples]; equal shapes are drawn alike, so that they can be compared draw by draw.

    Args:
        values: [captions, seeds], NaN where a video has none.
        resamples: how many.
    """
    captions, seeds = values.shape
    draw = np.random.default_rng(SEED)
    rows = draw.integers(0, captions, (resamples, captions, 1))
    columns = draw.integers(0, seeds, (resamples, captions, seeds))
    return _means(values[rows, columns], (1, 2))


def mean(values: Array, resamples: int = RESAMPLES) -> Interval | None:
    """Return the mean of [captions, seeds], or None if no video has a value."""
    return _interval(float(_means(values, (0, 1))), means(values, resamples), int(np.isfinite(values).sum()))


def ratio(above: Array, below: Array, resamples: int = RESAMPLES) -> Interval | None:
    """Return the ratio of two means over the same captions and seeds, or None if it is not finite."""
    found = _ratio(_means(above, (0, 1)), _means(below, (0, 1)))
    drawn = _ratio(means(above, resamples), means(below, resamples))
    return _interval(float(found), drawn, int(min(np.isfinite(above).sum(), np.isfinite(below).sum())))


def ratio_difference(
    mine: tuple[Array, Array], theirs: tuple[Array, Array], resamples: int = RESAMPLES
) -> Interval | None:
    """Return a ratio of two means less another, of the same captions and seeds draw by draw; None if not finite."""
    value = [float(_ratio(_means(above, (0, 1)), _means(below, (0, 1)))) for above, below in (mine, theirs)]
    drawn = [_ratio(means(above, resamples), means(below, resamples)) for above, below in (mine, theirs)]
    return _interval(value[0] - value[1], drawn[0] - drawn[1], int(np.isfinite(mine[0] * theirs[0]).sum()))


def overlap(a: Interval, b: Interval) -> bool:
    """Return whether two intervals share a point."""
    return a.low <= b.high and b.low <= a.high


def _interval(value: float, drawn: Array, n: int) -> Interval | None:
    known = drawn[np.isfinite(drawn)]
    if not (np.isfinite(value) and len(known)):
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(value, min(value, float(low)), max(value, float(high)), n)


def _ratio(above: Array, below: Array) -> Array:
    """Return a ratio, NaN without a warning where the divisor is 0."""
    return np.asarray(above / np.where(below == 0, np.nan, below))


def _means(values: Array, axes: int | Sequence[int]) -> Array:
    """Return means that leave NaN out, and NaN without a warning where there is nothing else."""
    known = np.isfinite(values)
    count = known.sum(tuple(axes) if isinstance(axes, Sequence) else axes)
    total = np.where(known, values, 0).sum(tuple(axes) if isinstance(axes, Sequence) else axes)
    return np.asarray(total / np.where(count, count, np.nan))
