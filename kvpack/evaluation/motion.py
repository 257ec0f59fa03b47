"""How fast something moves that moves as a body does: along straight lines with bounces, or as a consistent flow."""

from functools import lru_cache

import numpy as np

from kvpack.errors import KVPackError
from kvpack.evaluation.facts import Values

WINDOW_SECONDS = 0.75  # short enough for at most one bounce an axis
TOLERANCE = 2 / 64  # frame heights that a path may be off, root mean square
FLOW_SHARE = 0.05  # the fastest part of a picture is its motion
FLOW_SLACK = 0.5  # pixels by which the flow back may miss


def coherent_speed(centre: Values, fps: float) -> float:
    """Return the mean speed of a centre [T, 2] along `paths`, in its unit a second; NaN if it is too short for one.

    A window off its path counts nothing.
    """
    residual, speed = paths(centre, fps)
    return float(np.where(residual <= TOLERANCE, speed, 0.0).mean()) if len(speed) else float("nan")


def paths(centre: Values, fps: float) -> tuple[np.ndarray, np.ndarray]:
    """Fit paths of one speed with at most one bounce an axis to a centre [T, 2], in windows of 0.75 seconds.

    Windows overlap by half. Returns how far the centre is off, root mean square, and the speed a second, each
    [windows]; off is infinite where a frame of the window is NaN.
    """
    length = max(6, round(WINDOW_SECONDS * fps))
    if len(centre) < length:
        return np.zeros(0), np.zeros(0)
    starts = np.arange(0, len(centre) - length + 1, length // 2)
    windows = np.lib.stride_tricks.sliding_window_view(centre.astype(np.float64), length, axis=0)[starts]
    whole: np.ndarray = np.asarray(np.isfinite(windows).all(axis=(1, 2)))
    values = np.where(whole[:, None, None], windows, 0.0)
    values = values - values.mean(-1, keepdims=True)
    bases, solutions = _bounces(length)
    weights = np.einsum("bkl,wal->wabk", solutions, values)
    fitted = np.einsum("blk,wabk->wabl", bases, weights)
    errors = ((fitted - values[:, :, None]) ** 2).mean(-1)
    best = errors.argmin(-1)[..., None]
    residual = np.sqrt(np.take_along_axis(errors, best, -1)[..., 0].sum(1))
    slope = np.take_along_axis(weights[..., 1], best, -1)[..., 0]
    return np.where(whole, residual, np.inf), np.hypot(slope[:, 0], slope[:, 1]) * fps


@lru_cache(maxsize=8)
def _bounces(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return paths of unit speed that turn at most once, [b, length, 2], and their least-squares solutions."""
    steps = np.arange(length, dtype=np.float64)
    turns = np.arange(1.0, length - 1, 0.5)[:, None]
    bent = np.concatenate([steps[None], np.where(steps > turns, 2 * turns - steps, steps)])
    bases = np.stack([np.ones_like(bent), bent], -1)
    return bases, np.linalg.pinv(bases)


def flow_speed(before: Values, after: Values, fps: float) -> float:
    """Return the speed of the fastest pixels between two grey frames [h, w] in 0..1, in frame heights a second.

    Pixels count where the flow back from `after` leads to where it came from; 0 where fewer than half do.

    Raises:
        KVPackError: if scikit-image isn't installed.
    """
    try:
        # Imported when it's needed: it takes a second, and most videos have a subject.
        from skimage.registration import optical_flow_ilk
    except ImportError as error:
        raise KVPackError(
            "a video without a subject that can be tracked needs optical flow, and scikit-image isn't installed; "
            "install it with: pip install 'kvpack[evaluation]'"
        ) from error

    height, width = before.shape
    down, right = optical_flow_ilk(before, after)
    back = optical_flow_ilk(after, before)
    y, x = np.mgrid[0:height, 0:width]
    to = (np.clip(np.rint(y + down), 0, height - 1).astype(int), np.clip(np.rint(x + right), 0, width - 1).astype(int))
    missed = np.hypot(down + back[0][to], right + back[1][to])
    consistent = missed < FLOW_SLACK
    if consistent.mean() < 0.5:
        return 0.0
    speeds = np.sort(np.hypot(down, right)[consistent])
    return float(speeds[-max(1, int(FLOW_SHARE * len(speeds))) :].mean() * fps / height)
