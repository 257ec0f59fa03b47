"""Any video file, read frame by frame."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.errors import InvalidOptionError
from kvpack.media.video import Frames

TOGETHER = 16  # frames decoded at a time
USUAL_FPS = 16.0  # where the file doesn't say


@dataclass(frozen=True)
class VideoFile:
    """An open video.

    Args:
        fps: frames a second.
        frames: its frames in pieces [t, H, W, 3]; can be read once.
    """

    fps: float
    frames: Iterator[Frames]


@contextmanager
def opened(path: Path) -> Iterator[VideoFile]:
    """Open a video file of any kind that libav reads.

    Raises:
        InvalidOptionError: if there is no such file, or it holds no video that can be decoded.
    """
    import av

    if not path.is_file():
        raise InvalidOptionError(f"no video {path}; give a file, e.g. video.mp4")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InvalidOptionError(f"{path} must be a video, got a file without pictures")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            yield VideoFile(float(rate) if rate else USUAL_FPS, _decoded(container))
    except av.FFmpegError as error:
        raise InvalidOptionError(f"{path} must be a video that libav decodes, got: {error.strerror}") from error


def _decoded(container: Any) -> Iterator[Frames]:
    waiting: list[Frames] = []
    for frame in container.decode(video=0):
        picture = frame.to_ndarray(format="rgb24")
        if waiting and (len(waiting) == TOGETHER or waiting[0].shape != picture.shape):
            yield np.stack(waiting)
            waiting = []
        waiting.append(picture)
    if waiting:
        yield np.stack(waiting)
