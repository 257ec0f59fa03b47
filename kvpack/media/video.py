"""Videos that are encoded while they are generated."""

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

from kvpack.errors import InvalidOptionError, NonFiniteLatentsError, OutputError, plain
from kvpack.media.files import PartialFile, require_writable

Frames = NDArray[np.uint8]
FrameRate = float | int

CODECS = ("libx264", "libopenh264", "h264", "mpeg4")
_FRAGMENT = "1000000"  # microseconds of video that may be lost where a process is killed
_NARROW = 128  # pixels
_MOST_FPS = 1e6
_MOST_WHITE = 2.0  # a decoder's overshoot is far below
_BT709, _BT601, _STUDIO_RANGE = 1, 6, 1  # as ITU-T H.273 numbers them


def is_hd(height: int, width: int) -> bool:
    """Return whether players take a video that does not say its colour matrix for BT.709, and not for BT.601."""
    return height >= 720 or width >= 1280


class VideoWriter:
    """An mp4 that is encoded while its frames are generated, in constant memory.

    Until it is complete it is `name.1234.part.mp4`, 1234 being the process, which plays up to its last second or so
    even if the process is killed. A `KeyboardInterrupt` or `SystemExit` completes it with the frames that are there;
    after another error they are `name.part.mp4`, and what the path held before stays.

    Args:
        path: the file, which appears when the `with` block ends without an error, or is interrupted.
        fps: frames a second.
        upscale: times that every pixel is repeated, for videos too small to look at.

    Raises:
        OutputError: if the path cannot be written, before anything is encoded, or if the disk runs full.
        InvalidOptionError: if `fps` is no number above 0.
    """

    def __init__(self, path: Path | str, fps: FrameRate, upscale: int = 1) -> None:
        path, fps = Path(path), plain(fps)
        if not isinstance(fps, int | float | Fraction) or not 0 < fps < _MOST_FPS:
            raise InvalidOptionError(f"fps must be a number of frames a second above 0, e.g. 16, got {fps!r}")
        if path.suffix.lower() != ".mp4":
            raise OutputError(f"cannot write {path}: videos are mp4; give a name that ends in .mp4")
        # A fraction that libav takes; 1001 is for rates such as 30000/1001.
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
        """Append frames, `[frames, height, width, 3]`, bytes or floats in 0..1 as pipelines return them.

        Raises:
            InvalidOptionError: if they are anything else, or of another size than those before.
            OutputError: outside of the `with` block, or if the disk runs full.
        """
        import av
        from av.video.reformatter import ColorRange, Colorspace

        if self._file is None:
            raise OutputError(f"{self.path} is not open; write inside of `with VideoWriter(...) as writer:`")
        _require_frames(frames)
        whole = _even(as_bytes(frames).repeat(self.upscale, axis=1).repeat(self.upscale, axis=2))
        if self._stream is not None and whole.shape[1:3] != (self._stream.height, self._stream.width):
            size, given = f"{self._stream.height}x{self._stream.width}", "x".join(map(str, whole.shape[1:3]))
            raise InvalidOptionError(f"frames must stay {size}, as the first ones were, got {given}")
        for frame in whole:
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
        assert self._file is not None
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        try:
            with _signals_wait():
                if self._stream is not None and not isinstance(error, OutputError):
                    with self._file.reported():
                        self._container.mux(self._stream.encode())
                        self._container.close()
                    path = self.path if kind is None or interrupted else self.path.with_suffix(".part.mp4")
                    self._file.commit(path)
                    if error is not None:
                        error.add_note(f"{path} holds the {float(self.frames / self.fps):.1f} s that were made")
                elif kind is None:
                    raise OutputError(f"cannot write {self.path}: no frame was generated")
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what was written and has no name yet."""
        import av

        assert self._file is not None
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
            # Other encoders have no crf; theirs is a rate.
            stream.bit_rate = 8 * height * width
        return stream


def _require_frames(frames: object) -> None:
    """Raise `InvalidOptionError` unless these are frames of one video, bytes or floats in 0..1."""
    if not isinstance(frames, np.ndarray) or frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype.kind not in "fu":
        kind = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else f"a {type(frames).__name__}"
        raise InvalidOptionError(
            f"write takes an array [frames, height, width, 3], got {kind}; of output_type='np' it is each video's own, "
            "e.g. frames[0]"
        )
    if frames.dtype != np.uint8 and frames.size and frames.max() > _MOST_WHITE:
        raise InvalidOptionError(
            f"frames must be uint8, or floats in 0..1, got {frames.dtype} up to {frames.max():.4g}; divide them by 255"
        )


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
    # Those that Python handles; the default of SIGTERM is the system's.
    handled = [each for each in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(each))]
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in handled}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _even(frames: Frames) -> Frames:
    """Repeat the last row and column where their number is odd, which codecs refuse."""
    rows, columns = frames.shape[1] % 2, frames.shape[2] % 2
    return np.pad(frames, ((0, 0), (0, rows), (0, columns), (0, 0)), mode="edge") if rows or columns else frames
