"""What is known of a video beside its pixels."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import InvalidOptionError, unknown_name
from kvpack.media.video import Frames

Values = NDArray[np.float32]
Mask = NDArray[np.bool_]
Colour = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of a video besides its pixels; a check whose fact is not given is not made.

    H and W are the height and width of the video, colours are red, green and blue in 0..1.

    Args:
        fps: frames a second.
        subject: how much each pixel of frames [t, h, w, 3] belongs to the subject, [t, h, w] in 0..1, above 0.5 where
            it does; h is at most 64, larger frames are reduced before. Without, what differs from the median frame.
        colour: the subject's colour, a name of `palette`.
        palette: the colours that it could have.
        shape: the subject's shape, a name of `shapes`.
        shapes: the shapes that it could have, each drawn [h, w] in 0..1 in any size.
        background: the background's name, one of `backgrounds`.
        backgrounds: what it could look like without light of a landmark, each [H, W, 3] in 0..1.
        landmarks: places that are on or off, each [H, W]; no subject is looked for in them.
        glow: how much of a landmark's colour it adds to each pixel around while it is on, [H, W], by landmark.
        bright: a landmark is on where its brightest channel is above this, in 0..1.

    Raises:
        InvalidOptionError: if a name isn't among its choices, or a number or an array can't be what it should be.
    """

    fps: float = 16.0
    subject: Callable[[Frames], Values] | None = None
    colour: str | None = None
    palette: Mapping[str, Colour] = field(default_factory=dict)
    shape: str | None = None
    shapes: Mapping[str, Values] = field(default_factory=dict)
    background: str | None = None
    backgrounds: Mapping[str, Values] = field(default_factory=dict)
    landmarks: Mapping[str, Mask] = field(default_factory=dict)
    glow: Mapping[str, Values] = field(default_factory=dict)
    bright: float = 0.58

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise InvalidOptionError(f"fps must be a number > 0, got {self.fps}")
        named: tuple[tuple[str, str | None, Mapping[str, Any]], ...] = (
            ("colour", self.colour, self.palette),
            ("shape", self.shape, self.shapes),
            ("background", self.background, self.backgrounds),
        )
        for kind, name, choices in named:
            if name is not None and name not in choices:
                raise unknown_name(kind, name, choices)
        for name in self.glow:
            if name not in self.landmarks:
                raise unknown_name("landmark", name, self.landmarks)

    def require_size(self, height: int, width: int) -> None:
        """Check that all given backgrounds, landmarks and glows have the video's size.

        Raises:
            InvalidOptionError: if something has another.
        """
        drawn: tuple[tuple[str, Mapping[str, NDArray[Any]]], ...] = (
            ("background", self.backgrounds),
            ("landmark", self.landmarks),
            ("glow", self.glow),
        )
        for kind, items in drawn:
            for name, array in items.items():
                if array.shape[:2] != (height, width):
                    raise InvalidOptionError(
                        f"{kind} {name!r} must be as large as the video, {height}x{width}, got "
                        f"{'x'.join(map(str, array.shape[:2]))}"
                    )
