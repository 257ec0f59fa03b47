"""A video in segments: each an mp4 of its own, whole once a checkpoint says so, and joined without encoding anew."""

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

from kvpack.errors import OutputError
from kvpack.media.files import PartialFile, checksum, make_folder
from kvpack.media.video import FrameRate, Frames, VideoWriter


@dataclass(frozen=True)
class Segment:
    """A whole segment."""

    name: str
    frames: int
    bytes: int
    sha256: str


class SegmentedVideo:
    """A video that can be gone on with where a checkpoint was made, in this process or another.

    A segment begins with a key frame and depends on no other, so that one that is half written when the process ends
    is thrown away, and nothing else.

    Args:
        done: the segments that are whole, as `cut` returned them; others in the folder are removed.

    Raises:
        OutputError: if one of them is missing or not what was written.
    """

    def __init__(self, folder: Path, fps: FrameRate, done: Sequence[Any] = ()) -> None:
        self.folder, self.fps = make_folder(folder), fps
        try:
            self.segments = [Segment(**each) for each in done]
        except TypeError as error:
            raise OutputError(f"{folder} cannot be gone on with: its checkpoint does not list segments") from error
        for each in self.segments:
            self._check(each)
        clear(folder, {each.name for each in self.segments})
        self._writer: VideoWriter | None = None

    @property
    def frames(self) -> int:
        """Pixel frames so far."""
        return sum(each.frames for each in self.segments) + (0 if self._writer is None else self._writer.frames)

    def write(self, frames: Frames) -> None:
        """Append frames, `[frames, height, width, 3]`."""
        if self._writer is None:
            self._writer = VideoWriter(self.folder / f"segment-{len(self.segments) + 1:06d}.mp4", self.fps).__enter__()
        self._writer.write(frames)

    def cut(self) -> list[dict[str, Any]]:
        """End the segment, on the disk for certain, and return all of them as JSON takes them."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.__exit__(None, None, None)  # a closed mp4 that plays alone
            with open(writer.path, "rb+") as file:
                os.fsync(file.fileno())
            size = writer.path.stat().st_size
            self.segments.append(Segment(writer.path.name, writer.frames, size, checksum(writer.path)))
        return [asdict(each) for each in self.segments]

    def __enter__(self) -> "SegmentedVideo":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the last segment, but throw it away after an error."""
        if kind is None or issubclass(kind, KeyboardInterrupt | SystemExit):
            self.cut()
        elif self._writer is not None:
            writer, self._writer = self._writer, None
            writer.discard()

    def join(self, output: Path) -> None:
        """Copy the packets of all segments, as they are, into one mp4 that appears when it is whole and on the disk.

        Raises:
            OutputError: if it cannot be written, there is no frame, or the segments do not go together.
        """
        import av

        if not self.segments:
            raise OutputError(f"cannot write {output}: no frame was generated")
        file = PartialFile(output)
        delay = max(map(self._delay, self.segments))  # one for all, so that times ascend from segment to segment
        with file.reported(), av.open(file, "w", format="mp4") as container:
            stream: Any = None
            first = 0
            for segment in self.segments:
                with self._opened(segment) as source:
                    given = source.streams.video[0]
                    if stream is None:
                        stream = container.add_stream_from_template(given)
                        like = given.codec_context.extradata, given.time_base
                    # One stream has one header, for all its packets.
                    if (given.codec_context.extradata, given.time_base) != like:
                        raise OutputError(
                            f"cannot write {output}: {segment.name} was encoded otherwise than the first segment; the "
                            f"segments are in {self.folder}"
                        )
                    _copy(source, given, container, stream, first, delay, self.fps)
                first += segment.frames
        file.commit(durable=True)  # the segments may be removed now

    def _delay(self, segment: Segment) -> int:
        """Return the time of a segment's first picture, which a codec that reorders them shows later."""
        with self._opened(segment) as source:
            return int(source.streams.video[0].start_time or 0)

    def _opened(self, segment: Segment) -> Any:
        import av

        return av.open(str(self.folder / segment.name))

    def _check(self, segment: Segment) -> None:
        kinds = (segment.name, str), (segment.frames, int), (segment.bytes, int)
        alike = all(isinstance(value, kind) for value, kind in kinds)
        if not alike or segment.frames < 1 or not segment.name.isprintable():
            raise OutputError(f"{self.folder} cannot be gone on with: its checkpoint does not list segments")
        path = self.folder / segment.name
        there = path.parent == self.folder and path.is_file() and path.stat().st_size == segment.bytes
        if not there or checksum(path) != segment.sha256:
            raise OutputError(f"{path} is missing or not what was written; the video cannot be gone on with from there")


def clear(folder: Path, kept: Collection[str] = ()) -> None:
    """Remove the segments in a folder, but for those that are named."""
    for path in folder.glob("segment-*.mp4"):
        if path.name not in kept:
            path.unlink(missing_ok=True)


def _copy(source: Any, given: Any, container: Any, stream: Any, first: int, delay: int, fps: FrameRate) -> None:
    """Copy packets, their times counted from frame `first` on, with the delay that the slowest segment needs."""
    # Ticks of a frame.
    each, start = 1 / (Fraction(fps).limit_denominator(1001) * given.time_base), int(given.start_time or 0)
    packets = (packet for packet in source.demux(given) if packet.dts is not None)  # the last one is empty
    for index, packet in enumerate(packets, first):
        shown = round((packet.pts - start) / each) + first
        packet.pts, packet.dts, packet.stream = round(shown * each) + delay, round(index * each), stream
        container.mux(packet)
