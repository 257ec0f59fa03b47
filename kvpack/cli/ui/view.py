"""What the page shows: the videos, memory and speed in figures, and the past that each chunk looks at."""

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from kvpack.cli.report import heat
from kvpack.cli.support import size_text
from kvpack.cli.ui.studio import Studio
from kvpack.cli.ui.video import Video

COLOURS = ("#0072B2", "#D55E00")
_POINTS = 240
#: The chunks that an update brings, so that one may be lost on its way; the page has those before.
_KEPT = 4
_WIDTH, _HEIGHT = 320, 110


def showing(studio: Studio | None) -> dict[str, Any]:
    """Return what the player in the browser is to show, as JSON takes it."""
    if studio is None:
        return {"name": "", "videos": []}
    videos = []
    for video in studio.videos:
        for first in sorted(video.pictures)[:-_KEPT]:
            del video.pictures[first]
        videos.append(
            {
                "label": video.label,
                "first": video.first,
                "made": video.frames,
                "pictures": {str(first): each for first, each in video.pictures.items()},
                "prompts": [[round(second, 2), text] for second, text in video.prompts],
            }
        )
    return {"name": studio.name, "fps": studio.videos[0].fps, "ended": studio.ended, "videos": videos}


def figures(videos: Sequence[Video]) -> str:
    """Return all of it; before the first chunk what will be there."""
    if not any(video.held for video in videos):
        return '<p class="kvp-note">Memory, speed and what the memory looks at appear here with the first chunk.</p>'
    numbers = "".join(_numbers(video, colour) for video, colour in zip(videos, COLOURS, strict=False) if video.held)
    maps = "".join(_map(video, colour) for video, colour in zip(videos, COLOURS, strict=False) if video.traced)
    return f'<div class="kvp-numbers">{numbers}</div>{_memory(videos)}<div class="kvp-maps">{maps}</div>'


def _numbers(video: Video, colour: str) -> str:
    attended, held = video.held[-1]
    rows = {
        "looked at": size_text(attended),
        "held in all": size_text(held),
        "speed": f"{video.speed:.0f} frames/s",
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows.items())
    return f'<section><h3 style="border-color:{colour}">{html.escape(video.label)}</h3><dl>{cells}</dl></section>'


def _memory(videos: Sequence[Video]) -> str:
    """Draw the bytes that are held, as lines, and those attended, dashed."""
    top = max(held for video in videos for _, held in video.held) or 1
    end = max(video.made for video in videos) or 1.0
    lines = []
    for video, colour in zip(videos, COLOURS, strict=False):
        each = (video.frames - video.first) / max(1, len(video.held)) / video.fps
        begin = video.first / video.fps
        step = -(-len(video.held) // _POINTS) or 1
        for part, dash in ((1, ""), (0, 'stroke-dasharray="4 3"')):
            points = " ".join(
                f"{(begin + (index + 1) * each) / end * _WIDTH:.1f},{_HEIGHT * (1 - video.held[index][part] / top):.1f}"
                for index in range(0, len(video.held), step)
            )
            lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" {dash}/>')
    told = f"memory over {end:.0f} s of video, up to {size_text(top)}"
    return (
        f"<figure><figcaption>Memory: held (line) and looked at (dashed); the top is {size_text(top)}</figcaption>"
        f'<svg viewBox="0 -2 {_WIDTH} {_HEIGHT + 4}" role="img" aria-label="{told}" preserveAspectRatio="none">'
        f"{''.join(lines)}</svg>{_seconds(0, end)}</figure>"
    )


def _map(video: Video, colour: str) -> str:
    """Draw which past is attended when: across the second of the video, up the second of the past."""
    assert video.traced is not None
    _, _, cells = heat(video.traced, None)
    ink = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)], np.float32)
    share = np.array(cells, np.float32)[::-1, :, None].clip(0, 1)
    picture, data = Image.fromarray((255 - share * (255 - ink)).round().astype(np.uint8)), BytesIO()
    picture.save(data, format="png")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    told = f"{html.escape(video.label)}: the past that it looks at"
    note = f"{told}, upwards its second; the darker, the more layers do"
    chunks = video.traced.chunks
    begin, end = video.traced.seconds[0], video.traced.seconds[-1]
    end += chunks[-1]["frames"] * video.traced.head["seconds_a_frame"]
    return f'<figure><figcaption>{note}</figcaption><img src="{source}" alt="{told}">{_seconds(begin, end)}</figure>'


def _seconds(begin: float, end: float) -> str:
    return f'<div class="kvp-axis"><span>second {begin:.0f} of the video</span><span>{end:.0f}</span></div>'
