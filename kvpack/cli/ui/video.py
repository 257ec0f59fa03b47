"""One video of a page: its frames as pictures, and what its memory did, chunk by chunk."""

import base64
import json
import time
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kvpack.cli.report import Traced
from kvpack.media.video import as_bytes
from kvpack.pipeline.stream import Stream

#: Frames up to this side are kept bit for bit; larger ones are photographs.
_SMALL = 128


@dataclass
class Video:
    """A video that is being made.

    Args:
        frames: pixel frames so far, those before a fork or a resume included.
        first: frame that this video begins with.
        pictures: the last chunks' frames, as data URLs, by the first frame of each.
        seconds: that each chunk took.
        held: bytes attended and held behind each chunk.
        prompts: what was asked for from which second of the video on.
    """

    label: str
    pipeline: Any
    stream: Stream
    trace: Path
    frames: int = 0
    first: int = 0
    pictures: dict[int, list[str]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    held: list[tuple[int, int]] = field(default_factory=list)
    prompts: list[tuple[float, str]] = field(default_factory=list)
    ended: bool = False
    traced: Traced | None = None

    @property
    def fps(self) -> float:
        """Frames a second of the video."""
        return float(self.pipeline.packforcing.fps)

    @property
    def made(self) -> float:
        """Seconds of the video that are there."""
        return self.frames / self.fps

    @property
    def speed(self) -> float:
        """Frames made in a second of its own time."""
        return (self.frames - self.first) / max(sum(self.seconds), 1e-9)

    def advance(self, prompt: str | None = None, cut: bool = False) -> bool:
        """Make one chunk, under another prompt if one is given; return whether there was one to make."""
        if not self.seconds:
            self.pipeline.packforcing.trace(self.trace)  # read when a generation begins: a fork has a file of its own
        start = time.perf_counter()
        try:
            frames = self.stream.send(prompt, cut=cut)[0]
        except StopIteration:
            self.ended = True
            return False
        if prompt or cut:
            self.prompts.append((self.made, (prompt or "as before") + (" (cut)" if cut else "")))
        self.seconds.append(time.perf_counter() - start)
        stats = self.pipeline.packforcing.stats()
        self.held.append((stats["attended_bytes"], stats["resident_bytes"]))
        self.pictures[self.frames] = [_picture(frame) for frame in frames]
        self.frames += len(frames)
        self._read_trace()
        return True

    def _read_trace(self) -> None:
        known = 0 if self.traced is None else 1 + len(self.traced.chunks)
        with self.trace.open(encoding="utf-8") as file:
            lines = [json.loads(line) for number, line in enumerate(file) if number >= known]
        for line in lines:
            if self.traced is None:
                self.traced = Traced(self.label, line, [])
            else:
                self.traced.chunks.append({key: line[key] for key in ("first_frame", "frames", "attended")})


def _picture(frame: np.ndarray) -> str:
    """Return a frame, `[height, width, 3]` in 0..1, as a data URL."""
    data, kind = BytesIO(), "png" if max(frame.shape) <= _SMALL else "jpeg"
    Image.fromarray(as_bytes(frame)).save(data, format=kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
