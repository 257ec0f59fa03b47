"""Full history: nothing is ever dropped (Self-Forcing, arXiv 2506.08009, global attention)."""

from dataclasses import dataclass

from kvpack.memory.roles import Partitioner, Segment


@dataclass(frozen=True)
class FullPartitioner(Partitioner):
    """Keeps every frame at full resolution.

    >>> FullPartitioner().partition(6, chunk_frames=3)
    (Segment(part='recent', frames=range(0, 6)),)
    """

    name = "full"

    @property
    def horizon_frames(self) -> int:
        """A frame's part never changes."""
        return 0

    def partition(self, history_frames: int, chunk_frames: int) -> tuple[Segment, ...]:
        """Return all frames as recent."""
        return (Segment("recent", range(history_frames)),)
