"""Files that are written whole or not at all, and videos that are encoded while they are generated."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import OutputError

Frames = NDArray[np.uint8]
FrameRate = float | int

CODECS = ("libx264", "libopenh264", "h264", "mpeg4")


def require_writable(path: Path) -> Path:
    """Return `path` if a file can be written there; an empty one beside it is tried.

    Raises:
        OutputError: if not.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, no error for names that are too long
        raise OutputError(f"cannot write {path}: it is a directory; give the name of a file in it")
    if not os.path.isdir(path.parent):
        what = "is not a directory" if os.path.exists(path.parent) else "does not exist"
        raise OutputError(f"cannot write {path}: {path.parent} {what}; give a file in a directory that exists")
    trial = _partial(path)
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; give a file in a writable directory") from error
    return path


class PartialFile:
    """A file that appears under its name only when it is complete.

    Args:
        path: where it will be.

    Raises:
        OutputError: if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._partial = require_writable(path), _partial(path)
        #: What went wrong while writing; libav tells no more than that something did.
        self.error: OSError | None = None
        with self.reported():
            self._file = open(self._partial, "w+b")  # noqa: SIM115  # closed by commit or discard
        self.seek, self.tell, self.read = self._file.seek, self._file.tell, self._file.read

    def write(self, data: bytes) -> int:
        """Append bytes."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def commit(self) -> None:
        """Move the complete file to its name."""
        with self.reported():
            self._file.close()
            os.replace(self._partial, self.path)

    def discard(self) -> None:
        """Remove what was written."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._partial.unlink()

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Raise an `OutputError` for any failure to write, and discard the file."""
        import av

        try:
            yield
        except (OSError, av.FFmpegError) as error:
            cause = self.error or error
            if hasattr(self, "_file"):
                self.discard()
            reason = getattr(cause, "strerror", None) or cause
            raise OutputError(f"cannot write {self.path}: {reason}; nothing of it was kept") from cause


class VideoWriter:
    """An mp4 that is encoded while its frames are generated, in constant memory.

    Args:
        path: the file, which appears when the `with` block ends without an error.
        fps: frames a second.
        upscale: times that every pixel is repeated, for videos too small to look at.

    Raises:
        OutputError: if the path cannot be written, before anything is encoded, or if the disk runs full.
    """

    def __init__(self, path: Path, fps: FrameRate, upscale: int = 1) -> None:
        if path.suffix.lower() != ".mp4":
            raise OutputError(f"cannot write {path}: videos are mp4; give a name that ends in .mp4")
        self.path, self.fps, self.upscale = require_writable(path), Fraction(fps).limit_denominator(1001), upscale
        self.frames = 0
        self._file: PartialFile | None = None
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> "VideoWriter":
        import av

        self._file = PartialFile(self.path)
        self._container = av.open(self._file, "w", format="mp4")
        return self

    def write(self, frames: Frames) -> None:
        """Append frames, `[frames, height, width, 3]`."""
        import av

        assert self._file is not None
        for frame in _even(frames.repeat(self.upscale, axis=1).repeat(self.upscale, axis=2)):
            if self._stream is None:
                self._stream = self._open_stream(*frame.shape[:2])
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            with self._file.reported():
                self._container.mux(self._stream.encode(picture))
            self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import av

        assert self._file is not None
        try:
            if kind is None and self._stream is not None:
                with self._file.reported():
                    self._container.mux(self._stream.encode())
                    self._container.close()
                self._file.commit()
            elif kind is None:
                raise OutputError(f"cannot write {self.path}: no frame was generated")
        finally:
            # Where the disk is full, the container's last words cannot be written either.
            with suppress(OSError, ValueError, av.FFmpegError):
                self._container.close()
            self._file.discard()

    def _open_stream(self, height: int, width: int) -> Any:
        import av

        codec = next((name for name in CODECS if name in av.codecs_available), CODECS[-1])
        stream: Any = self._container.add_stream(codec, rate=self.fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "18", "preset": "veryfast"}
        else:
            stream.bit_rate = 8 * height * width
        return stream


def save_bytes(data: bytes, path: Path) -> None:
    """Write a file, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    file = PartialFile(path)
    try:
        with file.reported():
            file.write(data)
        file.commit()
    finally:
        file.discard()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _even(frames: Frames) -> Frames:
    """Repeat the last row and column where their number is odd, which codecs refuse."""
    rows, columns = frames.shape[1] % 2, frames.shape[2] % 2
    return np.pad(frames, ((0, 0), (0, rows), (0, columns), (0, 0)), mode="edge") if rows or columns else frames
