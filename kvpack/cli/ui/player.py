"""The player, which runs in the browser: one picture or two in step, and a line of time that grows."""

from typing import Any

from kvpack.cli.support import page_file
from kvpack.cli.ui.studio import Studio

#: The chunks that an update brings, so that one may be lost on its way.
_KEPT = 4


def showing(studio: Studio | None) -> dict[str, Any]:
    """Return what the player is to show, as JSON takes it."""
    if studio is None:
        return {"name": "", "videos": []}
    videos = []
    for video in studio.videos:
        video.forget_pictures(_KEPT)
        prompts = [[round(second, 2), text] for second, text in video.prompts]
        videos.append(
            {
                "label": video.label,
                "first": video.first,
                "made": video.frames,
                "pictures": {str(first): each for first, each in video.pictures.items()},
                "prompts": prompts,
            }
        )
    return {"name": studio.name, "fps": studio.videos[0].fps, "ended": studio.ended, "videos": videos}


TEMPLATE = page_file("player.html")

STYLE = page_file("player.css")

SCRIPT = page_file("player.js")
