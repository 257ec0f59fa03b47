"""What the demo shows of its videos: one picture that explains itself, and a page around it."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from textwrap import fill

import numpy as np

from kvpack.cli.demo_draw import FAINT, RIGHT, WRONG, Curve, Sheet
from kvpack.cli.demo_seen import Ends, Seen
from kvpack.cli.support import page_file
from kvpack.media.video import Frames

WIDTH, LABEL, TILE, GAP = 1400, 250, 128, 8
COLOURS = ("#CC3311", "#777777", "#0072B2", "#009E73", "#AA4499")
#: What a memory keeps of the past, in a reader's words.
KEEPS = {
    "full": "keeps all of its past",
    "self-forcing": "keeps the last 5 seconds",
    "packforcing": "keeps the first 2 seconds and the last one; looks up the rest",
    "truth": "drawn by the rules, no model",
}
_SMOOTH = 9  # chunks of a running median


@dataclass(frozen=True)
class Story:
    """All that is shown.

    Args:
        times: second of each column of frames.
        names: of the memories, with their options.
        seen: their videos.
        truth: frames of a rendered video; empty where there is none.
        ends: last frames over several seeds by name, of videos of `ends_seconds`; empty where there are none.
    """

    prompt: str
    seconds: float
    times: Sequence[float]
    names: Sequence[str]
    seen: Sequence[Seen]
    truth: Sequence[Frames]
    ends: dict[str, Ends]
    ends_seconds: float

    @property
    def title(self) -> str:
        """What this is, in a line."""
        count = len(self.names)
        which = "one memory" if count == 1 else f"{count} memories, the same noise"
        return f"{self.seconds:.0f} seconds of video by a tiny model: {which}"

    @property
    def about(self) -> str:
        """What the reader looks at."""
        return (
            f"The model learned from clips of 5 seconds. Here it was asked for {self.seconds:.0f} seconds of "
            f'"{self.prompt}". Whatever touches a wall lights it. Each wall has a colour of its own, which no prompt '
            "names: to get it right again, the model must still know what it made before."
        )


def picture(story: Story) -> bytes:
    """Return the whole picture as a PNG."""
    sheet = Sheet(WIDTH)
    sheet.text(story.title, 28)
    sheet.text(story.about)
    sheet.top += 14
    _videos(sheet, story)
    _curves(sheet, story)
    if story.ends:
        _ends(sheet, story)
    data = BytesIO()
    sheet.image().quantize(256).save(data, format="png", optimize=True)
    return data.getvalue()


def _videos(sheet: Sheet, story: Story) -> None:
    """Draw frames of each video, and below them when its walls were right."""
    left, right = LABEL, LABEL + len(story.times) * (TILE + GAP) - GAP
    digits = ".0f" if story.seconds >= 20 else ".2g"
    for column, second in enumerate(story.times):
        sheet.label(left + column * (TILE + GAP), sheet.top, f"second {second:{digits}}", 14, FAINT)
    sheet.top += 22
    for name, seen in zip(story.names, story.seen, strict=True):
        _named(sheet, name)
        for column, frame in seen.stills.items():
            sheet.tile(left + column * (TILE + GAP), sheet.top, frame, TILE)
        top = sheet.top + TILE + 4
        again = seen.returns()
        sheet.ticks((left, top, right, top + 22), again, story.seconds)
        sheet.label(sheet.margin, top + 11, "wall lit again:", 14, anchor="lm")
        sheet.label(sheet.margin + 105, top + 3, "right", 13, RIGHT, "lm")
        sheet.label(sheet.margin + 105, top + 19, "wrong", 13, WRONG, "lm")
        sheet.label(sheet.margin, sheet.top + 88, counted(again, story.seconds), 14)
        sheet.top += TILE + 40
    if story.truth:
        _named(sheet, "truth")
        for column, frame in enumerate(story.truth):
            sheet.tile(left + column * (TILE + GAP), sheet.top, frame, TILE)
        sheet.top += TILE + 14


def _named(sheet: Sheet, name: str) -> None:
    sheet.label(sheet.margin, sheet.top + 8, name, 17)
    sheet.label(sheet.margin, sheet.top + 32, fill(KEEPS.get(name, ""), 30), 14, FAINT)


def counted(again: Sequence[tuple[float, bool]], seconds: float) -> str:
    """Say how many walls were right, after the first minute where there is one.

    >>> counted([(3.0, True), (70.0, True), (80.0, False)], 120.0)
    'after a minute 1 of 2 right'
    """
    late = [right for second, right in again if second >= 60] if seconds > 60 else [right for _, right in again]
    if not late:
        return "no wall was lit again"
    return f"{'after a minute ' if seconds > 60 else ''}{sum(late)} of {len(late)} right"


def _curves(sheet: Sheet, story: Story) -> None:
    """Draw memory and time over the length of the video."""
    sheet.top += 44
    height = max(210, 20 * len(story.names))  # room for the names at their ends
    top, bottom, middle = sheet.top, sheet.top + height, WIDTH // 2
    used, spent = [], []
    for name, seen, colour in zip(story.names, story.seen, cycle(COLOURS), strict=False):
        used.append(Curve(name, colour, seen.ends, [count / 1e6 for count in seen.used]))
        spent.append(Curve(name, colour, seen.ends, smoothed(seen.seconds)))
    sheet.chart((70, top, middle - 130, bottom), "keys and values in use, MB", used, story.seconds)
    title = "processor seconds of a chunk (running median)"
    sheet.chart((middle + 70, top, WIDTH - 130, bottom), title, spent, story.seconds)
    sheet.top = bottom + 44
    held = ", ".join(f"{name} {seen.held[-1] / 1e6:.1f} MB" for name, seen in zip(story.names, story.seen, strict=True))
    sheet.text(f"Held at the end, with room for the largest chunk of the video: {held}.", 15, colour=FAINT)
    sheet.top += 10


def smoothed(seconds: Sequence[float]) -> list[float]:
    """Return the running median of the seconds of chunks; the first chunk, which warms up, is as the second."""
    steady = [*seconds[1:2], *seconds[1:]] or list(seconds)
    half = _SMOOTH // 2
    return [float(np.median(steady[max(0, at - half) : at + half + 1])) for at in range(len(seconds))]


def _ends(sheet: Sheet, story: Story) -> None:
    """Draw the last frame of each seed, and how alike the subject stayed."""
    count = max(len(each.pictures) for each in story.ends.values())
    sheet.text(
        f"Not one lucky video: second {story.ends_seconds:.0f} of {count} others, each with noise of its own", 20
    )
    sheet.text(
        "The number is how much of its shape, size and colour the subject still has in the last five seconds, compared "
        "with the first five: 1 is the same, 0 another one or none.",
        15,
        colour=FAINT,
    )
    sheet.top += 10
    beside = (WIDTH - LABEL) // (TILE + GAP)
    for name, ends in story.ends.items():
        _named(sheet, name)
        sheet.label(sheet.margin, sheet.top + 88, f"mean {np.mean(ends.likeness):.2f}", 17)
        for column, (frame, alike) in enumerate(zip(ends.pictures, ends.likeness, strict=True)):
            if column and column % beside == 0:
                sheet.top += TILE + 28
            x = LABEL + column % beside * (TILE + GAP)
            sheet.tile(x, sheet.top, frame, TILE)
            sheet.label(x + TILE // 2, sheet.top + TILE + 3, f"{alike:.2f}", 14, FAINT, "ma")
        sheet.top += TILE + 28


def page(story: Story, drawn: bytes, video: str) -> str:
    """Return an HTML page around the picture, which needs no network; the video lies beside it."""
    rows = "".join(_row(name, seen, story) for name, seen in zip(story.names, story.seen, strict=True))
    told = {"title": story.title, "about": story.about, "video": video}
    escaped = {name: html.escape(text) for name, text in told.items()}
    return page_file("demo.html").format(rows=rows, source=base64.b64encode(drawn).decode(), **escaped)


def _row(name: str, seen: Seen, story: Story) -> str:
    keeps = KEEPS.get(name, "")
    spent = smoothed(seen.seconds)
    cells = [
        f"<b>{html.escape(name)}</b><br>{keeps}",
        f"{seen.used[len(seen.used) // 4] / 1e6:.1f} MB, then {seen.used[-1] / 1e6:.1f} MB",
        f"{spent[len(spent) // 4]:.2f} s, then {spent[-1]:.2f} s",
        counted(seen.returns(), story.seconds),
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
