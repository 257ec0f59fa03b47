"""Three partitions: sink, compressed mid, recent (PackForcing, arXiv 2603.25730, section 3)."""

from dataclasses import dataclass

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory.roles import Partitioner, Segment


@dataclass(frozen=True)
class SinkMidRecentPartitioner(Partitioner):
    """Keeps the first and the last frames whole and compresses what lies between, exact to the frame.

    Args:
        sink_frames: first latent frames, whole and never dropped.
        recent_frames: last latent frames before the current chunk, whole.

    Raises:
        InvalidOptionError: if a size is negative, or sink and recent together are smaller than a chunk.

    >>> SinkMidRecentPartitioner(8, 4).partition(20, chunk_frames=4)[1]
    Segment(part='mid', frames=range(8, 16))
    """

    sink_frames: int = 8
    recent_frames: int = 4
    name = "sink-mid-recent"

    def __post_init__(self) -> None:
        require_int("sink_frames", self.sink_frames)
        require_int("recent_frames", self.recent_frames)

    @property
    def horizon_frames(self) -> int:
        """A frame leaves recent after its length."""
        return self.recent_frames

    def partition(self, history_frames: int, chunk_frames: int) -> tuple[Segment, ...]:
        """Split history into sink, mid and recent; a short history has no mid."""
        sink = min(self.sink_frames, history_frames)
        recent = max(sink, history_frames - self.recent_frames)
        return (
            Segment("sink", range(sink)),
            Segment("mid", range(sink, recent)),
            Segment("recent", range(recent, history_frames)),
        )

    def check(self, chunk_frames: int) -> None:
        """Check that sink and recent together hold at least a chunk."""
        if self.sink_frames + self.recent_frames < chunk_frames:
            raise InvalidOptionError(
                f"sink_frames + recent_frames must be at least chunk_frames {chunk_frames}, "
                f"got {self.sink_frames} + {self.recent_frames}"
            )
