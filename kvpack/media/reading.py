"""Files of pictures and videos, read as a player shows them: upright, in their proportions, at a frame rate."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from kvpack.errors import InvalidOptionError
from kvpack.media.video import FrameRate, Frames, is_hd

TOGETHER = 16  # frames decoded at a time
USUAL_FPS = 16.0  # where the file doesn't say
_UNSAID = 2  # colour matrix, as ITU-T H.273 numbers it
#: What Pillow raises for files that are damaged, or too large to be meant.
_UNREADABLE = UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, TypeError, ValueError
_TIE = 1e-3  # seconds; of two frames as near, the earlier one, though a file rounds times to milliseconds


@dataclass(frozen=True)
class VideoFile:
    """An open video, whose frames can be read once.

    Args:
        fps: frames a second.
        aspect: width of a stored pixel over its height.
        matrix: a stored pixel at (x, y) is shown at (ax + cy, bx + dy), these being a, b, c, d.
        decoded: decoded frames, each with the second at which it is shown.
    """

    fps: float
    aspect: float
    matrix: tuple[int, int, int, int]
    decoded: Iterator[tuple[float, Any]]

    @property
    def frames(self) -> Iterator[Frames]:
        """All frames in pieces [t, H, W, 3]."""
        waiting: list[Frames] = []
        for _, frame in self.decoded:
            picture = self.shown(frame)
            if waiting and (len(waiting) == TOGETHER or waiting[0].shape != picture.shape):
                yield np.stack(waiting)
                waiting = []
            waiting.append(picture)
        if waiting:
            yield np.stack(waiting)

    def at(self, fps: FrameRate) -> Iterator[Any]:
        """Yield at each 1 / `fps` seconds the decoded frame whose time is nearest; some come twice, some never."""
        last: tuple[float, Any] | None = None
        count = 0
        for time, frame in self.decoded:
            while last is not None and count / fps <= (last[0] + time) / 2 + _TIE:
                yield last[1]
                count += 1
            last = time, frame
        while last is not None and count / fps <= last[0] + 0.5 / self.fps + _TIE:
            yield last[1]
            count += 1

    def shown(self, frame: Any) -> Frames:
        """Return a decoded frame [H, W, 3] in square pixels, turned and mirrored as its display matrix says."""
        width, height = round(frame.width * max(self.aspect, 1)), round(frame.height / min(self.aspect, 1))
        unsaid = frame.colorspace == _UNSAID and is_hd(frame.height, frame.width)
        colours = {"src_colorspace": "ITU709"} if unsaid else {}
        picture: Frames = frame.to_ndarray(format="rgb24", width=width, height=height, **colours)
        a, b, c, d = self.matrix
        if math.hypot(a, d) < math.hypot(b, c):  # a quarter turn: rows are shown as columns
            picture, a, d = picture.swapaxes(0, 1), c, b
        return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


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
        # Titles in other encodings are no reason to fail.
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise InvalidOptionError(f"{path} must be a video, got a file without pictures")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or USUAL_FPS)
            frames = container.decode(video=0)
            first = list(islice(frames, 1))
            yield VideoFile(
                rate, float(stream.sample_aspect_ratio or 1), _matrix(first), _timed(chain(first, frames), rate)
            )
    except av.FFmpegError as error:
        raise InvalidOptionError(f"{path} must be a video that libav decodes, got: {error.strerror}") from error


def count_frames(path: Path, fps: FrameRate | None = None) -> int:
    """Return how many frames `read_clip` would yield."""
    with opened(path) as file:
        return sum(1 for _ in file.at(fps or file.fps))


def read_clip(
    path: Path, fps: FrameRate | None = None, *, first: int | None = None, last: int | None = None
) -> Iterator[Frames]:
    """Yield a video's frames [H, W, 3] one by one; none is held, and with `last` the file is decoded twice.

    Args:
        path: the file.
        fps: frames a second that are wanted; None is the file's own.
        first: frames after which reading ends; None is all.
        last: frames, the last of all, that are wanted; None is all.

    Raises:
        InvalidOptionError: if there is no such file, or it holds no video that can be decoded.
    """
    skipped = 0 if last is None else max(0, count_frames(path, fps) - last)
    with opened(path) as file:
        for frame in islice(file.at(fps or file.fps), skipped, first):
            yield file.shown(frame)


def is_picture(path: Path) -> bool:
    """Return whether a file holds one picture, and not a clip.

    Raises:
        InvalidOptionError: if there is no such file.
    """
    if not path.is_file():
        raise InvalidOptionError(f"no picture or clip {path}; give a file, e.g. picture.png or clip.mp4")
    try:
        with Image.open(path) as picture:
            return getattr(picture, "n_frames", 1) == 1
    except _UNREADABLE:
        return False


def read_picture(path: Path) -> Image.Image:
    """Read a picture with all that its file says of it.

    Raises:
        InvalidOptionError: if there is no such file, or it holds no picture.
    """
    if not path.is_file():
        raise InvalidOptionError(f"no picture {path}; give a file, e.g. picture.png")
    try:
        picture = Image.open(path)
        picture.load()
    except _UNREADABLE as error:
        raise InvalidOptionError(f"{path} must be a picture, got: {error}") from error
    return picture


def _matrix(frames: list[Any]) -> tuple[int, int, int, int]:
    """Return the display matrix of the first frame, which all share; looking at every frame's would keep them alive."""
    data = [bytes(each) for frame in frames for each in frame.side_data if each.type.name == "DISPLAYMATRIX"]
    if not data:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(data[0], np.int32)[:5].tolist()
    return a, b, c, d


def _timed(frames: Iterable[Any], fps: float) -> Iterator[tuple[float, Any]]:
    start: float | None = None
    for index, frame in enumerate(frames):
        time = index / fps if frame.time is None else float(frame.time)
        start = time if start is None else start
        yield time - start, frame  # a file's first frame need not be at 0
