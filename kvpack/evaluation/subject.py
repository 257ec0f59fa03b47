"""The subject of every frame: where it is, how large, of what colour and form."""

from dataclasses import dataclass

import numpy as np

from kvpack.evaluation.facts import Mask, Values
from kvpack.evaluation.grid import grown, shrunk

SMALLEST, LARGEST = 0.008, 0.5  # share of the frame that a subject may fill
FORM = 16  # rows and columns of a form
REACH = 0.95  # how far a form reaches from its centre, in roots of its area
DIFFERENT = 0.2  # distance in colour from the background, at which a pixel is the subject's


@dataclass(frozen=True)
class Looks:
    """The subject in t frames of h rows and w columns; NaN where it isn't visible.

    Args:
        mask: its pixels, [t, h, w].
        centre: (x, y) in frame heights, [t, 2].
        area: in squared frame heights, [t].
        colour: mean of its inner pixels in 0..1, [t, 3].
        form: it at its own centre and scale, [t, 16, 16] in 0..1; 0 where it isn't visible.
    """

    mask: Mask
    centre: Values
    area: Values
    colour: Values
    form: Values


def differing(planes: Values, background: Values) -> Values:
    """Return how much pixels of frames [t, 3, h, w] differ from a background [3, h, w]; above 0.5 is the subject."""
    red, green, blue = ((planes[:, channel] - background[channel]) ** 2 for channel in range(3))
    return np.asarray(np.clip(np.sqrt(red + green + blue) / (2 * DIFFERENT), 0, 1), np.float32)


def look(planes: Values, soft: Values) -> Looks:
    """Find the subject of frames [t, 3, h, w] in 0..1, given its soft mask [t, h, w]."""
    height, width = soft.shape[1:]
    hard = soft > 0.5
    core = shrunk(hard)  # what is one pixel wide, such as a blurred edge, has none
    weight = soft * grown(grown(grown(core)))
    total = weight.sum((1, 2))
    solid = core.astype(np.float32)
    inner = solid.sum((1, 2))
    # Too little is noise; too much is a change of the background.
    visible = (total >= SMALLEST * height * width) & (total <= LARGEST * height * width) & (inner > 0)
    mass = np.maximum(total, 1e-6)
    x = weight.sum(1) @ np.arange(width, dtype=np.float32) / mass
    y = weight.sum(2) @ np.arange(height, dtype=np.float32) / mass
    colour = (planes * solid[:, None]).sum((2, 3)) / np.maximum(inner, 1)[:, None]
    form = canonical(weight, x, y, np.sqrt(mass)) * visible[:, None, None]
    gone = ~visible[:, None]
    return Looks(
        mask=hard & (weight > 0) & visible[:, None, None],
        centre=np.where(gone, np.nan, np.stack([x, y], 1) / height).astype(np.float32),
        area=np.where(visible, total / height**2, np.nan).astype(np.float32),
        colour=np.where(gone, np.nan, colour).astype(np.float32),
        form=form.astype(np.float32),
    )


def canonical(weight: Values, x: Values, y: Values, scale: Values) -> Values:
    """Resample images [t, h, w] around their centres at their scales, [t, 16, 16]; 0 beyond the frame."""
    height, width = weight.shape[1:]
    steps = np.linspace(-REACH, REACH, FORM, dtype=np.float32)
    rows, columns = y[:, None] + scale[:, None] * steps, x[:, None] + scale[:, None] * steps
    top, left = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
    down, right = rows - top, columns - left
    padded = np.pad(weight, ((0, 0), (1, 1), (1, 1)))
    frame = np.arange(len(weight))[:, None, None]

    def at(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        inside = np.clip(row + 1, 0, height + 1)[:, :, None], np.clip(column + 1, 0, width + 1)[:, None, :]
        return np.asarray(padded[frame, inside[0], inside[1]])

    upper = at(top, left) * (1 - right[:, None]) + at(top, left + 1) * right[:, None]
    lower = at(top + 1, left) * (1 - right[:, None]) + at(top + 1, left + 1) * right[:, None]
    return np.asarray(upper * (1 - down[:, :, None]) + lower * down[:, :, None], np.float32)


def template(drawn: Values) -> Values:
    """Return the form [16, 16] of a shape that is drawn [h, w] in 0..1."""
    weight = drawn[None].astype(np.float32)
    total = np.maximum(weight.sum((1, 2)), 1e-6)
    x = weight.sum(1) @ np.arange(weight.shape[2], dtype=np.float32) / total
    y = weight.sum(2) @ np.arange(weight.shape[1], dtype=np.float32) / total
    return canonical(weight, x, y, np.sqrt(total))[0]


def nearest(values: Values, choices: Values) -> np.ndarray:
    """Return the index of the nearest of `choices` [n, ...] to each of `values` [t, ...], [t]."""
    flat, options = values.reshape(len(values), -1), choices.reshape(len(choices), -1)  # [each, cells]
    return np.asarray(((flat[:, None] - options) ** 2).sum(-1).argmin(1))
