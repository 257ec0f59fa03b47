"""Frames on coarser grids, and masks grown and shrunk, many frames at once."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import InvalidOptionError
from kvpack.evaluation.facts import Mask, Values
from kvpack.media.video import Frames

HEIGHT = 64  # rows that are looked at; larger frames are reduced
ROWS = 16  # of a thumbnail


def require_frames(frames: object) -> Frames:
    """Return `frames` if they are a video, uint8 [t, H, W, 3] with at least one frame.

    Raises:
        InvalidOptionError: if not.
    """
    wanted = "frames must be a uint8 array [frames, height, width, 3]"
    if not isinstance(frames, np.ndarray):
        raise InvalidOptionError(f"{wanted}, got {type(frames).__name__}")
    if frames.dtype != np.uint8:
        hint = "; multiply by 255 and round" if frames.dtype.kind == "f" else ""
        raise InvalidOptionError(f"{wanted}, got {frames.dtype}{hint}")
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise InvalidOptionError(f"{wanted}, got shape {list(frames.shape)}")
    if min(frames.shape[1:3]) < 8 or frames.shape[0] == 0:
        raise InvalidOptionError(f"{wanted} of at least one frame and 8x8 pixels, got shape {list(frames.shape)}")
    return frames


def working_size(height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns that frames are reduced to before they are measured.

    >>> working_size(480, 832), working_size(64, 64)
    ((64, 111), (64, 64))
    """
    return (height, width) if height <= HEIGHT else (HEIGHT, max(8, round(width * HEIGHT / height)))


def thumbnail_size(height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of a thumbnail.

    >>> thumbnail_size(64, 111)
    (16, 28)
    """
    rows = min(ROWS, height)
    return rows, max(1, min(width, round(width * rows / height)))


def means(array: NDArray[Any], rows: int, columns: int) -> Values:
    """Average over the cells of a grid: [..., H, W] to [..., rows, columns]."""
    height, width = array.shape[-2:]
    whole = array.astype(np.float32)
    if (height, width) == (rows, columns):
        return whole
    return cells(whole, rows, columns) / cells(np.ones((height, width), np.float32), rows, columns)


def cells(array: Values, rows: int, columns: int) -> Values:
    """Sum over the cells of a grid: [..., H, W] to [..., rows, columns]."""
    height, width = array.shape[-2:]
    # As a product of matrices: many times faster than a sum over short axes.
    return np.asarray(_members(height, rows) @ (array @ _members(width, columns).T), np.float32)


@lru_cache(maxsize=16)
def _members(length: int, count: int) -> Values:
    """Return which of `length` pixels belong to each of `count` cells, [count, length]."""
    edges = np.linspace(0, length, count + 1).astype(np.int64)
    at = np.arange(length)
    return ((at >= edges[:-1, None]) & (at < edges[1:, None])).astype(np.float32)


def grown(mask: Mask) -> Mask:
    """Grow masks [t, H, W] by the four neighbours of every pixel."""
    near = mask.copy()
    near[:, 1:] |= mask[:, :-1]
    near[:, :-1] |= mask[:, 1:]
    near[:, :, 1:] |= mask[:, :, :-1]
    near[:, :, :-1] |= mask[:, :, 1:]
    return near


def shrunk(mask: Mask) -> Mask:
    """Remove the outermost pixels of masks [t, H, W]; the frame's border does not count as outside."""
    return ~grown(~mask)
