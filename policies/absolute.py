"""Positions as generated (Self-Forcing, arXiv 2506.08009)."""

from dataclasses import dataclass
from typing import ClassVar

from kvpack.memory.roles import Layout, Placement, Reindexer


@dataclass(frozen=True)
class AbsoluteReindexer(Reindexer):
    """Leaves every frame at its index in the video; distances grow without bound."""

    name = "absolute"
    absolute: ClassVar[bool] = True

    def place(self, layout: Layout) -> Placement:
        """Keep the first frames as they are."""
        chunk_start = layout.frames.new_full((layout.frames.shape[0],), float(layout.chunk_first_frame))
        return Placement(layout.first_frames, layout.frames, chunk_start)
