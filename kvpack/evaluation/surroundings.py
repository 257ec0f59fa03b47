"""What is around the subject of every frame: thumbnails of the background, its flicker, and landmarks on or off."""

from collections.abc import Sequence

import numpy as np

from kvpack.evaluation.facts import Mask, Values
from kvpack.evaluation.grid import cells, thumbnail_size
from kvpack.media.video import Frames

CELL_SHARE = 0.25  # of a cell that must be background for the cell to count
SAMPLES = 64  # pixels of a landmark that are looked at


def thumbnails(planes: Values, keep: Mask) -> Values:
    """Shrink frames [t, 3, h, w] over the pixels of `keep` [t, h, w] to [t, 3, r, c] in 0..1; NaN where few."""
    rows, columns = thumbnail_size(*planes.shape[2:])
    weight = keep.astype(np.float32)
    kept = cells(weight, rows, columns)[:, None]
    size = cells(np.ones(planes.shape[2:], np.float32), rows, columns)
    mean = cells(planes * weight[:, None], rows, columns) / np.maximum(kept, 1)
    return np.asarray(np.where(kept >= CELL_SHARE * size, mean, np.nan), np.float32)


def landmarks(frames: Frames, places: Sequence[Mask], bright: float) -> tuple[Mask, Values]:
    """Return which landmarks [h, w] are on, [t, n], and their median colours in 0..1, [t, n, 3]."""
    on = np.zeros((len(frames), len(places)), bool)
    colours = np.zeros((len(frames), len(places), 3), np.float32)
    for index, place in enumerate(places):
        y, x = np.nonzero(place)
        picks = np.linspace(0, len(y) - 1, min(SAMPLES, len(y))).round().astype(np.int64)
        pixels = np.sort(frames[:, y[picks], x[picks]], axis=1)  # faster than a median on uint8
        colours[:, index] = pixels[:, len(picks) // 2] / np.float32(255)
        on[:, index] = colours[:, index].max(1) > bright
    return on, colours


def flicker(planes: Values, keep: Mask) -> Values:
    """Return the mean |difference| of successive frames [t, 3, h, w] where both keep, [t - 1]; NaN if nowhere."""
    both = (keep[1:] & keep[:-1]).astype(np.float32)
    count = both.sum((1, 2))
    change = np.abs(planes[1:] - planes[:-1])
    total = ((change[:, 0] + change[:, 1] + change[:, 2]) * both).sum((1, 2))
    return np.where(count > 0, total / (3 * np.maximum(count, 1)), np.nan).astype(np.float32)
