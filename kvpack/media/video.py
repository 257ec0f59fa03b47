"""Files that are written whole or not at all, and videos that are encoded while they are generated."""

import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import NonFiniteLatentsError, OutputError

Frames = NDArray[np.uint8]
FrameRate = float | int

CODECS = ("libx264", "libopenh264", "h264", "mpeg4")
_FRAGMENT = "1000000"  # microseconds of video that may be lost where a process is killed
_NARROW = 128  # pixels
_BT709, _BT601, _STUDIO_RANGE = 1, 6, 1  # as ITU-T H.273 numbers them


def is_hd(height: int, width: int) -> bool:
    """Return whether players take a video that does not say its colour matrix for BT.709, and not for BT.601."""
    return height >= 720 or width >= 1280


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


def make_folder(folder: Path) -> Path:
    """Return a folder, made if it is not there.

    Raises:
        OutputError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the directory {folder}: {error.strerror}; give another --output") from error
    return folder


class PartialFile:
    """A file that appears under its name only when it is complete.

    Args:
        path: where it will be.
        partial: where it is until then; beside it, and hidden, if None.

    Raises:
        OutputError: if it cannot be written.
    """

    def __init__(self, path: Path, partial: Path | None = None) -> None:
        self.path, self._partial = require_writable(path), partial or _partial(path)
        #: What went wrong while writing; libav tells no more than that something did.
        self.error: OSError | None = None
        with self.reported():
            # Unbuffered, so that what is written is there if the process is killed; closed by commit or discard.
            self._file = open(self._partial, "w+b", buffering=0)  # noqa: SIM115
        self.seek, self.tell, self.read = self._file.seek, self._file.tell, self._file.read

    def write(self, data: bytes) -> int:
        """Append bytes."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def commit(self, *, durable: bool = False) -> None:
        """Move the complete file to its name.

        Args:
            durable: whether it is on the disk for certain then, though the power fails.
        """
        with self.reported():
            if durable:
                os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
            if durable:
                sync_folder(self.path.parent)

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

    Until it is complete it is `name.1234.part.mp4`, 1234 being the process, which plays up to its last second or so
    even if the process is killed. A `KeyboardInterrupt` or `SystemExit` completes it with the frames that are there.

    Args:
        path: the file, which appears when the `with` block ends without an error, or is interrupted.
        fps: frames a second.
        upscale: times that every pixel is repeated, for videos too small to look at.

    Raises:
        OutputError: if the path cannot be written, before anything is encoded, or if the disk runs full.
    """

    def __init__(self, path: Path | str, fps: FrameRate, upscale: int = 1) -> None:
        path = Path(path)
        if path.suffix.lower() != ".mp4":
            raise OutputError(f"cannot write {path}: videos are mp4; give a name that ends in .mp4")
        self.path, self.fps, self.upscale = require_writable(path), Fraction(fps).limit_denominator(1001), upscale
        self.frames = 0
        self._file: PartialFile | None = None
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> "VideoWriter":
        import av

        self._file = PartialFile(self.path, self.path.with_suffix(f".{os.getpid()}.part.mp4"))
        # Fragments of a second, which become a plain mp4 at the end where libav can do that.
        hybrid = av.library_versions["libavformat"] >= (61, 7)
        flags = "hybrid_fragmented" if hybrid else "frag_keyframe+empty_moov"
        options = {"movflags": flags, "frag_duration": _FRAGMENT}
        self._container = av.open(self._file, "w", format="mp4", options=options)
        return self

    def write(self, frames: NDArray[Any]) -> None:
        """Append frames, `[frames, height, width, 3]`, bytes or floats in 0..1 as pipelines return them."""
        import av
        from av.video.reformatter import ColorRange, Colorspace

        assert self._file is not None
        frames = as_bytes(frames)
        for frame in _even(frames.repeat(self.upscale, axis=1).repeat(self.upscale, axis=2)):
            matrix = Colorspace.ITU709 if is_hd(*frame.shape[:2]) else Colorspace.ITU601
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=ColorRange.MPEG)
            with _signals_wait(), self._file.reported():
                if self._stream is None:
                    self._stream = self._open_stream(*frame.shape[:2])
                self._container.mux(self._stream.encode(picture))
                self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import av

        assert self._file is not None
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        try:
            with _signals_wait():
                if self._stream is not None and (kind is None or interrupted):
                    with self._file.reported():
                        self._container.mux(self._stream.encode())
                        self._container.close()
                    self._file.commit()
                    if error is not None:
                        error.add_note(f"{self.path} holds the {float(self.frames / self.fps):.1f} s that were made")
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
        context = stream.codec_context
        context.colorspace = _BT709 if is_hd(height, width) else _BT601
        context.color_primaries, context.color_trc, context.color_range = _BT709, _BT709, _STUDIO_RANGE
        if codec == "libx264":
            # For frames this narrow its vector code reads beyond them, so that one video gets many encodings.
            narrow = {"x264-params": "asm=0"} if width < _NARROW else {}
            stream.options = {"crf": "18", "preset": "veryfast", **narrow}
        else:
            stream.bit_rate = 8 * height * width
        return stream


def as_bytes(frames: NDArray[Any]) -> Frames:
    """Return frames as bytes, of floats in 0..1 or of bytes.

    Raises:
        NonFiniteLatentsError: if the VAE has put out NaN or infinity.
    """
    if frames.dtype == np.uint8:
        return frames
    if not np.isfinite(frames).all():
        raise NonFiniteLatentsError("decoded frames hold NaN or infinity; use a VAE in float32 or bfloat16")
    return np.round(frames.clip(0, 1) * 255).astype(np.uint8)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the end of the block: libav takes an exception in it for a broken file."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where no handler of Python's runs
        return
    came: list[int] = []
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in _handled()}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _handled() -> list[signal.Signals]:
    """Return the signals to end a process that Python handles; the default of SIGTERM is the system's."""
    return [each for each in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(each))]


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


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _even(frames: Frames) -> Frames:
    """Repeat the last row and column where their number is odd, which codecs refuse."""
    rows, columns = frames.shape[1] % 2, frames.shape[2] % 2
    return np.pad(frames, ((0, 0), (0, rows), (0, columns), (0, 0)), mode="edge") if rows or columns else frames
