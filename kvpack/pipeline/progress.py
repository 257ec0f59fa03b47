"""How far a generation is, for programs: what `on_chunk` is called with behind each chunk, and what is logged."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kvpack.errors import InvalidOptionError
from kvpack.generation.chunks import GeneratedChunk, pixel_frames
from kvpack.generation.run import Run
from kvpack.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Progress:
    """A chunk is done.

    Args:
        chunk: its number, from 0 on.
        chunks: chunks of the whole video; None if it has no end.
        frames: pixel frames of the video so far, as the call returns it: a clip that it puts in front is among them.
        video_seconds: the same in seconds of the video.
        seconds: that the chunk took; without decoding where that is done at the end.
        fps: pixel frames of this chunk in a second of that time.
        attended_bytes: keys and values of history that the chunk attended.
        archive_bytes: compressed blocks that are kept.
        resident_bytes: all that the memory holds.
    """

    chunk: int
    chunks: int | None
    frames: int
    video_seconds: float
    seconds: float
    fps: float
    attended_bytes: int
    archive_bytes: int
    resident_bytes: int

    def __str__(self) -> str:
        of = "" if self.chunks is None else f"/{self.chunks}"
        held = f"{self.attended_bytes / 1e6:.4g} MB attended, {self.resident_bytes / 1e6:.4g} MB held"
        return f"chunk {self.chunk + 1}{of}, {self.video_seconds:.2f} s of video: {self.fps:.3g} frames/s, {held}"


#: What a program may be told behind each chunk.
OnChunk = Callable[[Progress], Any]


def require_callback(on_chunk: Any) -> OnChunk | None:
    """Return what may be told behind each chunk.

    Raises:
        InvalidOptionError: if it is not None and cannot be called.
    """
    if on_chunk is not None and not callable(on_chunk):
        raise InvalidOptionError(f"on_chunk is called with a Progress behind each chunk, e.g. print; got {on_chunk!r}")
    return on_chunk


def reported(chunks: Iterator[GeneratedChunk], run: Run, on_chunk: OnChunk | None) -> Iterator[GeneratedChunk]:
    """Yield a run's chunks, each logged and told to `on_chunk` before it is handed out; say if it was interrupted."""
    made, start = _made_frames(run), time.perf_counter()
    for chunk in chunks:
        seconds, before, made = time.perf_counter() - start, made, _made_frames(run)
        if on_chunk is not None or logger.isEnabledFor(logging.INFO):
            progress = _progress(run, chunk.index, made, made - before, seconds)
            logger.info("%s", progress)
            if on_chunk is not None:
                on_chunk(progress)
                run.denoiser.forget_prompt()  # it may have changed weights
        yield chunk
        # From here on: what the one who took the chunk did with it is not the chunk's time.
        start = time.perf_counter()
    if run.interrupted:
        frames = made + run.frames_beside
        logger.warning("the pipeline was interrupted; the video ends at %.2f s (%d frames)", frames / run.fps, frames)


def _progress(run: Run, index: int, made: int, new: int, seconds: float) -> Progress:
    stats, frames = run.denoiser.stats(), made + run.frames_beside
    sizes = {name: int(stats.get(name, 0)) for name in ("attended_bytes", "archive_bytes", "resident_bytes")}
    return Progress(index, run.count, frames, frames / run.fps, seconds, new / max(seconds, 1e-9), **sizes)


def _made_frames(run: Run) -> int:
    """Return the pixel frames of all chunks so far; the last of them may reach beyond the video's end."""
    _, frames = run.position or (0, 0)
    return pixel_frames(frames if run.total_frames is None else min(frames, run.total_frames), 0, run.scale)
