"""Lengths in frames: a chunk of 4 latent frames is a second, but the first latent frame is one pixel frame."""

from __future__ import annotations

from benchmarks.toyworld.world import FPS
from kvpack.planning.planner import video_frames

LENGTHS = (5, 30, 60, 120, 600)  # seconds of the videos that tables tell of
BIN = 5  # seconds
STILLS = (0, 5, 15, 30, 60, 90, 120)  # seconds of the pictures that are kept


def frames(seconds: int) -> int:
    """Return the pixel frames of a video: 16 a second, less 3."""
    return video_frames(seconds, FPS, 4)[0]


def lengths(seconds: int) -> tuple[int, ...]:
    """Return the lengths to report of a video of `seconds`, its own last."""
    return (*(length for length in LENGTHS if length < seconds), seconds)


def bins(seconds: int) -> list[tuple[int, int]]:
    """Return the first frame and the end of each bin of 5 s."""
    return [(frames(end - BIN) if end > BIN else 0, frames(end)) for end in range(BIN, seconds + 1, BIN)]


def still_frames(seconds: int) -> dict[int, int]:
    """Return the frame of each second that a picture is kept of; the video's end is its last frame."""
    return {second: min(second * FPS, frames(seconds) - 1) for second in STILLS if second <= seconds}
