"""Plain vision: how well a video [T, H, W, 3] shows what its caption says, and how straight the object moves."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from benchmarks.toyworld import world
from benchmarks.toyworld.world import Array, Mask, Scene, Video

VISIBLE = 40  # pixels
DARK = 0.32  # no background is brighter
AREA = {"circle": 254.5, "square": 256.0, "triangle": 219.5}
SIZE_TOLERANCE = 0.2
WINDOW = 24  # frames
STRAIGHT = 1.5  # pixels of residual that a path may have
SLOWEST = 0.5  # share of the world's speed that counts as moving


@dataclass(frozen=True)
class Frames:
    """One value a frame; `centre` [T, 2] is (x, y) and NaN where nothing is visible."""

    visible: Mask
    right_size: Mask
    colour: Mask
    shape: Mask
    background_error: Array
    centre: Array


@dataclass(frozen=True)
class Summary:
    """Shares of frames or windows, mean background error in 0..1, and the median path residual in pixels."""

    visible: float
    right_size: float
    colour: float
    shape: float
    background_error: float
    path_fit: float
    straight: float
    moving: float


def object_mask(video: Video) -> Mask:
    """Pixels whose brightest channel is bright."""
    return np.asarray(video.max(-1) > world.BRIGHT * 255)


def _grown(mask: Mask) -> Mask:
    """The mask and one pixel around it: neither object nor background is pure there."""
    near = mask.copy()
    near[1:] |= mask[:-1]
    near[:-1] |= mask[1:]
    near[:, 1:] |= mask[:, :-1]
    near[:, :-1] |= mask[:, 1:]
    return near


def _centre(brightness: npt.NDArray[np.float64], near: Mask) -> tuple[float, float]:
    """Centre of what is brighter than any background: finer than whole pixels."""
    weights = np.where(near, np.clip(brightness - DARK, 0, None), 0)
    y, x = np.mgrid[0 : weights.shape[0], 0 : weights.shape[1]]
    return float((weights * x).sum() / weights.sum()), float((weights * y).sum() / weights.sum())


def _shape(brightness: npt.NDArray[np.float64], centre: tuple[float, float]) -> str:
    """The named shape that, drawn at the centre, is nearest to what is seen."""
    seen = np.clip((brightness - DARK) / (brightness.max() - DARK), 0, 1)
    where = np.asarray([centre], np.float32)
    return min(world.SHAPES, key=lambda shape: float(((world.coverage(shape, where)[0] - seen) ** 2).sum()))


def _colour(pixels: npt.NDArray[np.float64]) -> str:
    names = list(world.COLOURS)
    palette = np.array([world.COLOURS[name] for name in names])
    mean = pixels.mean(0)
    return names[int(((palette - mean) ** 2).sum(1).argmin())]


def measure_frames(video: Video, scene: Scene) -> Frames:
    """All measures of single frames."""
    masks, count = object_mask(video), len(video)
    areas = masks.sum((1, 2))
    visible = areas >= VISIBLE
    texture = world.background(scene.background)
    colour, shape = np.zeros(count, bool), np.zeros(count, bool)
    error, centre = np.zeros(count, np.float32), np.full((count, 2), np.nan, np.float32)
    for t in range(count):
        image, mask = video[t] / 255.0, masks[t]
        near = _grown(mask)
        error[t] = np.abs(image - texture)[~near].mean() if not near.all() else 1.0
        if visible[t]:
            centre[t] = place = _centre(image.max(-1), near)
            colour[t] = _colour(image[mask]) == scene.colour
            shape[t] = _shape(image.max(-1), place) == scene.shape
    close = np.abs(areas / AREA[scene.shape] - 1) <= SIZE_TOLERANCE
    return Frames(visible, visible & close, colour, shape, error, centre)


def _bounce(values: Array, rate: float) -> tuple[float, float]:
    """Least squared error, and the speed, of one coordinate that keeps its speed and turns at most once."""
    steps = np.arange(len(values), dtype=np.float64)
    best, speed = np.inf, 0.0
    for turn in (None, *np.arange(1.0, len(values) - 1, 0.5)):
        bent = steps if turn is None else np.where(steps > turn, 2 * turn - steps, steps)
        basis = np.stack([np.ones_like(bent), bent], 1)
        weights, *_ = np.linalg.lstsq(basis, values, rcond=None)
        error = float(((basis @ weights - values) ** 2).mean())
        if error < best:
            best, speed = error, float(abs(weights[1]) * rate)
    return best, speed


def path_window(centre: Array) -> tuple[float, float]:
    """RMS residual in pixels of constant velocity with wall bounces, and the speed in pixels a second."""
    (x_error, x_speed), (y_error, y_speed) = (_bounce(centre[:, axis], world.FPS) for axis in (0, 1))
    return float(np.sqrt(x_error + y_error)), float(np.hypot(x_speed, y_speed))


def paths(centre: Array) -> list[tuple[float, float]]:
    """Residual and speed of every window; a window with invisible frames has an infinite residual and no speed."""
    windows = [centre[t : t + WINDOW] for t in range(0, len(centre) - WINDOW + 1, WINDOW)]
    return [(float("inf"), 0.0) if np.isnan(w).any() else path_window(w) for w in windows]


def summarise(video: Video, scene: Scene) -> Summary:
    """All measures of one video."""
    f = measure_frames(video, scene)
    found = paths(f.centre) or [(float("nan"), float("nan"))]
    moving = [speed >= SLOWEST * world.SPEED for _, speed in found]
    straight = [residual < STRAIGHT and fast for (residual, _), fast in zip(found, moving, strict=True)]
    return Summary(
        visible=float(f.visible.mean()),
        right_size=float(f.right_size.mean()),
        colour=float(f.colour.mean()),
        shape=float(f.shape.mean()),
        background_error=float(f.background_error.mean()),
        path_fit=float(np.median([residual for residual, _ in found])),
        straight=float(np.mean(straight)),
        moving=float(np.mean(moving)),
    )


def average(rows: list[Summary]) -> Summary:
    """The mean of every column, but the median of the path residual, which may be infinite."""
    columns = {f.name: np.array([getattr(row, f.name) for row in rows]) for f in fields(Summary)}
    means = {name: float(np.median(c) if name == "path_fit" else c.mean()) for name, c in columns.items()}
    return Summary(**means)


def segments(video: Video, scene: Scene, edges: list[int]) -> list[Summary]:
    """Measures of the frames between one edge and the next."""
    return [summarise(video[a:b], scene) for a, b in itertools.pairwise(edges)]


def table(rows: dict[str, Summary]) -> str:
    """A Markdown table, one line a name."""
    names = [f.name for f in fields(Summary)]
    lines = ["| | " + " | ".join(n.replace("_", " ") for n in names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{getattr(row, n):.3f}" for n in names) + " |")
    return "\n".join(lines)
