"""Seconds in frames: a chunk of 4 latent frames is a second, but the first latent frame is one pixel frame only."""

from __future__ import annotations

from benchmarks.toyworld.world import FPS
from kvpack.planning.planner import video_frames

LENGTHS = (5, 30, 60, 120, 600)  # seconds of the videos that tables tell of
BIN = 5  # seconds
STILLS = (0, 5, 15, 30, 60, 90, 120)  # seconds of the pictures that are kept


def frames(seconds: int) -> int:
    """Pixel frames of a video of so many chunks, 16 a second less 3."""
    return video_frames(seconds, FPS)[0]


def lengths(seconds: int) -> tuple[int, ...]:
    """The lengths that a video of `seconds` holds, its own the last."""
    return (*(length for length in LENGTHS if length < seconds), seconds)


def bins(seconds: int) -> list[tuple[int, int]]:
    """First frame and end of each bin of 5 s."""
    return [(frames(end - BIN) if end > BIN else 0, frames(end)) for end in range(BIN, seconds + 1, BIN)]


def still_frames(seconds: int) -> dict[int, int]:
    """Second and frame of each picture that a video of `seconds` holds; its end is its last frame."""
    return {second: min(second * FPS, frames(seconds) - 1) for second in STILLS if second <= seconds}
