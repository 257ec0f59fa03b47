"""Average keys and values over time alone: rows and columns stay as fine as they are."""

from dataclasses import dataclass

from kvpack.errors import require_int
from kvpack.policies.pool import PoolCompressor


@dataclass(frozen=True)
class TimePoolCompressor(PoolCompressor):
    """Averages keys before RoPE, and values, over the frames of a block.

    Args:
        keep_frames: frames' worth of tokens that are left of a block.

    Raises:
        InvalidOptionError: if `keep_frames` is less than 1, or `coordinates` none of the words.

    >>> TimePoolCompressor().span(0, 4, (4, 4)).tokens
    16
    """

    keep_frames: int = 1
    name = "pool-time"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("keep_frames", self.keep_frames, minimum=1)

    def pooled(self, frames: int, grid: tuple[int, int]) -> tuple[int, int, int]:
        """Return a window for every place in the frame, and for every few frames."""
        return (min(self.keep_frames, frames), *grid)
