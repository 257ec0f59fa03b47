"""Drawing for the demo's picture: text, curves and ticks on a white sheet. Pillow is all that an installation has."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kvpack.media.video import Frames

INK, FAINT = "#222222", "#888888"
RIGHT, WRONG = "#0072B2", "#D55E00"  # told apart by colour-blind readers too, and by their places


@dataclass(frozen=True)
class Curve:
    """One line of a chart: its name, its colour, and its points."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]


class Sheet:
    """A white picture that grows downwards, with a margin on all sides; all lengths are pixels."""

    margin = 24

    def __init__(self, width: int) -> None:
        self.width, self.top = width, self.margin
        self._image = Image.new("RGB", (width, 2000), "white")
        self.draw: Any = ImageDraw.Draw(self._image)

    def _reach(self, bottom: float) -> None:
        """Make the sheet longer where something is to be drawn below its end."""
        if bottom > self._image.height:
            shorter, self._image = self._image, Image.new("RGB", (self.width, 2 * ceil(bottom)), "white")
            self._image.paste(shorter)
            self.draw = ImageDraw.Draw(self._image)

    def text(self, words: str, size: int = 17, left: int | None = None, colour: str = INK) -> None:
        """Write lines below what is there, broken where the sheet ends."""
        font, left = ImageFont.load_default(size=size), left or self.margin
        line = ""
        for word in words.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > self.width - left - self.margin:
                self._line(line, size, left, colour)
                longer = word
            line = longer
        self._line(line, size, left, colour)

    def _line(self, line: str, size: int, left: int, colour: str) -> None:
        self.label(left, self.top, line, size, colour)
        self.top += round(1.4 * size)

    def label(self, x: float, y: float, words: str, size: int = 15, colour: str = INK, anchor: str = "la") -> None:
        """Write something at a place."""
        self._reach(y + 2 * size * len(words.splitlines()))
        self.draw.multiline_text((x, y), words, colour, font=ImageFont.load_default(size=size), anchor=anchor)

    def tile(self, x: int, y: int, picture: Frames, side: int) -> None:
        """Put a small picture at a place, its pixels enlarged."""
        self._reach(y + side)
        self._image.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))

    def ticks(self, box: tuple[int, int, int, int], again: Sequence[tuple[float, bool]], end: float) -> None:
        """Draw a lane of ticks over time: upwards what was right, downwards what was wrong."""
        left, top, right, bottom = box
        self._reach(bottom)
        middle = (top + bottom) // 2
        self.draw.line((left, middle, right, middle), FAINT)
        for second, good in again:
            x = left + (right - left) * second / end
            self.draw.line((x, middle, x, top if good else bottom), RIGHT if good else WRONG, width=3)

    def chart(self, box: tuple[int, int, int, int], title: str, curves: Sequence[Curve], end: float) -> None:
        """Draw curves over the seconds of the video; each is named at its end."""
        left, top, right, bottom = box
        self._reach(bottom)
        self.label(left, top - 26, title, 17)
        highest = max((max(curve.y) for curve in curves), default=0) or 1.0
        step = _step(highest)
        levels = [step * index for index in range(int(highest * 1.05 / step) + 1)]
        scale = max(highest * 1.05, levels[-1])
        for level in levels:
            y = bottom - (bottom - top) * level / scale
            self.draw.line((left, y, right, y), "#DDDDDD")
            self.label(left - 8, y, f"{level:g}", 13, FAINT, "rm")
        for second in np.arange(0, end + 1e-6, _step(end)):
            self.label(left + (right - left) * second / end, bottom + 6, f"{second:g} s", 13, FAINT, "ma")
        names = []
        for curve in curves:
            points = [
                (left + (right - left) * x / end, bottom - (bottom - top) * y / scale)
                for x, y in zip(curve.x, curve.y, strict=True)
            ]
            self.draw.line(points, curve.colour, width=3, joint="curve")
            names.append((points[-1][1], curve))
        place = bottom + 20.0
        for count, (y, curve) in enumerate(sorted(names, key=lambda each: -each[0]), 1):
            # Names lie neither upon each other nor above the chart.
            place = max(min(y, place - 20), top + 20 * (len(names) - count))
            self.label(right + 8, place, curve.name, 15, curve.colour, "lm")

    def image(self) -> Image.Image:
        """Return what was drawn, cut below."""
        self._reach(self.top + self.margin)
        return self._image.crop((0, 0, self.width, self.top + self.margin))


def _step(highest: float) -> float:
    """Return a round distance of which about four go into a number.

    >>> _step(103), _step(0.37), _step(120)
    (20.0, 0.05, 20.0)
    """
    rough = highest / 4
    power = 10.0 ** np.floor(np.log10(rough))
    return float(max(each * power for each in (1, 2, 5) if each * power <= rough))
