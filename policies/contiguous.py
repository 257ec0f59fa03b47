"""Positions without gaps (PackForcing, arXiv 2603.25730, section 6)."""

from dataclasses import dataclass
from typing import ClassVar

from kvpack.memory.roles import Layout, Placement, Reindexer


@dataclass(frozen=True)
class ContiguousReindexer(Reindexer):
    """Numbers the frames of sink, chosen mid and recent 0, 1, 2, ..., the current chunk right behind.

    Equal to the paper's shift of the sink, since RoPE is relative, but never accumulates rounding.
    """

    name = "contiguous"
    shared: ClassVar[bool] = True

    def place(self, layout: Layout) -> Placement:
        """Place blocks without gaps from 0."""
        return Placement.consecutive(layout.lengths)
