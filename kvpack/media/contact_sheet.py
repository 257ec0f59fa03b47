"""Pictures of videos: a contact sheet, and the labels above panels that stand side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kvpack.media.video import Frames

MARGIN, GAP, HEADER = 12, 4, 66


@dataclass(frozen=True, eq=False)
class Row:
    """Pictures of one video, `[height, width, 3]` each, under a label of one line or several."""

    label: str
    pictures: Sequence[Frames]


def contact_sheet(title: str, columns: Sequence[str], rows: Sequence[Row], side: int = 128) -> bytes:
    """Return a PNG of labelled pictures.

    Args:
        title: line above all.
        columns: label of each column.
        rows: videos, with a picture for each column.
        side: width of a picture on the sheet.
    """
    large, small = ImageFont.load_default(size=18), ImageFont.load_default(size=14)
    height = round(side * rows[0].pictures[0].shape[0] / rows[0].pictures[0].shape[1])
    left = 2 * MARGIN + round(max(small.getlength(line) for row in rows for line in row.label.split("\n")))
    width = max(left + len(columns) * (side + GAP), MARGIN + round(large.getlength(title))) + MARGIN
    sheet = Image.new("RGB", (width, HEADER + len(rows) * (height + GAP) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, "black", font=large)
    for column, label in enumerate(columns):
        draw.text((left + column * (side + GAP) + side // 2, HEADER - 14), label, "black", font=small, anchor="mm")
    for index, row in enumerate(rows):
        top = HEADER + index * (height + GAP)
        draw.multiline_text((MARGIN, top + height // 2), row.label, "black", font=small, anchor="lm")
        for column, picture in enumerate(row.pictures):
            # Pixels stay as the model made them.
            tile = Image.fromarray(picture).resize((side, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (side + GAP), top))
    data = BytesIO()
    sheet.save(data, format="PNG")
    return data.getvalue()


def banner(labels: Sequence[str], width: int, gap: int, height: int = 28) -> Frames:
    """Draw one line of centred labels, for panels of `width` pixels that stand `gap` apart."""
    line = Image.new("RGB", (len(labels) * (width + gap) - gap, height), "white")
    draw, font = ImageDraw.Draw(line), ImageFont.load_default(size=16)
    for index, label in enumerate(labels):
        draw.text((index * (width + gap) + width // 2, height // 2), label, "black", font=font, anchor="mm")
    return np.asarray(line, dtype=np.uint8)


def side_by_side(panels: Sequence[Frames], upscale: int, top: Frames, gap: int) -> Frames:
    """Join the frames of several videos, `[frames, height, width, 3]` each, under a banner."""
    large = [panel.repeat(upscale, axis=1).repeat(upscale, axis=2) for panel in panels]
    white = np.full((*large[0].shape[:2], gap, 3), 255, dtype=np.uint8)
    parts = [part for panel in large for part in (white, panel)][1:]  # without a gap in front of the first
    body = np.concatenate(parts, axis=2)
    return np.concatenate([np.broadcast_to(top, (len(body), *top.shape)), body], axis=1)
