"""No compression: mid blocks stay at full resolution."""

from dataclasses import dataclass

from kvpack.memory.blocks import KVBlock, Span, grid_coordinates
from kvpack.memory.roles import Compressor


@dataclass(frozen=True)
class IdentityCompressor(Compressor):
    """Keeps every token.

    >>> IdentityCompressor().span(4, 2, (4, 4)).tokens
    32
    """

    name = "identity"
    by_head = True

    def span(self, first_frame: int, frames: int, grid: tuple[int, int]) -> Span:
        """Return all tokens at their own places."""
        return Span(first_frame, frames, grid_coordinates(frames, grid))

    def compress(self, block: KVBlock, grid: tuple[int, int]) -> KVBlock:
        """Return the block itself."""
        return block
