"""Compressed blocks on a temporal grid as fine as their tokens, not as their frames."""

from dataclasses import dataclass
from typing import ClassVar

from kvpack.errors import require_int
from kvpack.memory.roles import Layout, Placement, Reindexer


@dataclass(frozen=True)
class PackedReindexer(Reindexer):
    """As contiguous, but `frames_per_position` frames of a mid block share one position.

    So tokens that stand for two frames each lie one position apart, as tokens of two frames do in training. Named after
    the packed temporal grid of the compressor CR4 for Wan2.1-1.3B, of which no more than the name is public.

    Args:
        frames_per_position: frames that a token of the compressor stands for in time; 2 for all but `pool-time`.

    Raises:
        InvalidOptionError: if it is not positive.
    """

    frames_per_position: int = 2
    name = "packed"
    shared: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_int("frames_per_position", self.frames_per_position, minimum=1)

    def place(self, layout: Layout) -> Placement:
        """Place blocks without gaps from 0, mid blocks as short as their tokens."""
        lengths = layout.lengths.clone()
        lengths[:, layout.columns("mid")] /= self.frames_per_position
        return Placement.consecutive(lengths)
