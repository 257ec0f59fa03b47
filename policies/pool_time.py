"""Average keys and values over time alone: rows and columns stay as fine as they are."""

from dataclasses import dataclass, field
from typing import get_args

from kvpack.errors import require_choice, require_int
from kvpack.memory.blocks import Coordinates, KVBlock, Span, grid_coordinates
from kvpack.memory.roles import Compressor
from kvpack.policies.pool import averaged


@dataclass(frozen=True)
class TimePoolCompressor(Compressor):
    """Averages keys before RoPE, and values, over the frames of a block.

    Args:
        keep_frames: frames' worth of tokens that are left of a block.
        coordinates: as those of `PoolCompressor`.

    Raises:
        InvalidOptionError: if `keep_frames` is less than 1, or `coordinates` none of the words.

    >>> TimePoolCompressor().span(0, 4, (4, 4)).tokens
    16
    """

    keep_frames: int = 1
    coordinates: Coordinates = field(default="centered", kw_only=True)
    name = "pool-time"
    by_head = True

    def __post_init__(self) -> None:
        require_int("keep_frames", self.keep_frames, minimum=1)
        require_choice("coordinates", self.coordinates, get_args(Coordinates))

    def span(self, first_frame: int, frames: int, grid: tuple[int, int]) -> Span:
        """Return a token for every place in the frame, and for every window of frames."""
        pooled = (min(self.keep_frames, frames), *grid)
        return Span(first_frame, frames, grid_coordinates(frames, grid, pooled, self.coordinates))

    def compress(self, block: KVBlock, grid: tuple[int, int]) -> KVBlock:
        """Average every window of frames."""
        frames = block.span.frames
        sizes, pooled = (frames, *grid), (min(self.keep_frames, frames), *grid)
        keys, values = (averaged(each, sizes, pooled) for each in (block.keys, block.values))
        return KVBlock(keys, values, self.span(block.span.first_frame, frames, grid))
