"""Rolling window with an optional sink (Self-Forcing, arXiv 2506.08009; attention sinks, arXiv 2309.17453)."""

from dataclasses import dataclass

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory.roles import Partitioner, Segment


@dataclass(frozen=True)
class WindowPartitioner(Partitioner):
    """Keeps the first frames and the last ones; a chunk that ends at frame e sees f < sink or f >= e - (window - sink).

    Args:
        window_frames: latent frames attended, the sink and the current chunk included.
        sink_frames: first latent frames that are never dropped.

    Raises:
        InvalidOptionError: if a size is negative, or no history fits into the window.

    >>> WindowPartitioner(9, 3).partition(12, chunk_frames=3)
    (Segment(part='sink', frames=range(0, 3)), Segment(part='recent', frames=range(9, 12)))
    """

    window_frames: int = 9
    sink_frames: int = 3
    name = "window"

    def __post_init__(self) -> None:
        require_int("window_frames", self.window_frames, minimum=1)
        require_int("sink_frames", self.sink_frames)

    @property
    def horizon_frames(self) -> int:
        """A frame leaves the window after at most its length."""
        return self.window_frames

    def partition(self, history_frames: int, chunk_frames: int) -> tuple[Segment, ...]:
        """Return the sink, and what is left of the window beside the sink and the current chunk."""
        sink = min(self.sink_frames, history_frames)
        # The chunk takes its part of the window.
        oldest = history_frames + chunk_frames - (self.window_frames - self.sink_frames)
        recent = range(max(sink, oldest), history_frames)
        return (Segment("sink", range(sink)), Segment("recent", recent))

    def check(self, chunk_frames: int) -> None:
        """Check that the window holds the sink, the current chunk, and a chunk of history."""
        require_window(self.window_frames, self.sink_frames, chunk_frames)


def require_window(window_frames: int, sink_frames: int, chunk_frames: int) -> None:
    """Raise `InvalidOptionError` unless a window holds its sink, the current chunk, and a chunk of history."""
    least = max(sink_frames + chunk_frames, 2 * chunk_frames)
    if window_frames < least:
        raise InvalidOptionError(
            f"window_frames must be at least {least} (the sink of {sink_frames}, the current chunk of {chunk_frames} "
            f"frames, and at least a chunk of history), got {window_frames}"
        )
