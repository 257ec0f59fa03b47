"""What is known of the videos of the tiny model that comes with kvpack: its bright things, and its four walls."""

import numpy as np

from kvpack.evaluation.facts import Facts, Mask, Values
from kvpack.media.video import Frames
from kvpack.shipped import CALL, FPS

SIZE = int(CALL["height"])
WALL = 4  # pixels that a lit wall is thick
WALLS = ("left", "right", "top", "bottom")
BRIGHT = 0.58  # the brightest channel is above this on the subject and on a lit wall, below it on every background
RAMP = 0.16  # brightness on either side of it over which an edge's pixel turns into the subject


def brightness(video: Frames) -> Values:
    """Return how bright each pixel [t, H, W] is, in 0..1: 0.5 where the brightest channel is `BRIGHT`."""
    brightest = np.maximum(np.maximum(video[..., 0], video[..., 1]), video[..., 2])
    return np.clip((brightest / np.float32(255) - (BRIGHT - RAMP)) / (2 * RAMP), 0, 1).astype(np.float32)


def wall_mask(wall: str) -> Mask:
    """Return the mask of one wall's pixels, [H, W]."""
    mask = np.zeros((SIZE, SIZE), bool)
    edge = slice(None, WALL) if wall in ("left", "top") else slice(-WALL, None)
    mask[(slice(None), edge) if wall in ("left", "right") else edge] = True
    return mask


def tiny_facts() -> Facts:
    """Return what holds for each video of the tiny model, whatever its prompt."""
    landmarks = {wall: wall_mask(wall) for wall in WALLS}
    return Facts(fps=FPS, subject=brightness, landmarks=landmarks, bright=BRIGHT)
