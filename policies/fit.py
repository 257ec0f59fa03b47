"""Positions that never exceed those seen in training."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory.roles import Layout, Partitioner, Placement, Reindexer


@dataclass(frozen=True)
class FitReindexer(Reindexer):
    """As contiguous, but mid blocks share the positions that sink, recent and the current chunk leave free.

    Without mid blocks all history shares them, so that even full history fits.

    Args:
        train_frames: latent frames that the model saw in training.

    Raises:
        InvalidOptionError: if sink, recent and the current chunk alone are longer.
    """

    train_frames: int = 20
    name = "fit"
    shared: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_int("train_frames", self.train_frames, minimum=2)

    def place(self, layout: Layout) -> Placement:
        """Place blocks without gaps from 0, mid blocks squeezed into the positions that are left."""
        elastic = layout.columns("mid") if "mid" in layout.parts else slice(None)
        lengths = layout.lengths.clone()
        wanted = lengths[:, elastic].sum(dim=1, keepdim=True)
        room = self.train_frames - layout.chunk_frames - (lengths.sum(dim=1, keepdim=True) - wanted)
        # Squeezed, never stretched: a short history stays at its own distances.
        lengths[:, elastic] *= torch.clamp(room / wanted, max=1.0)
        return Placement.consecutive(lengths)

    def check(self, partitioner: Partitioner, chunk_frames: int) -> None:
        """Check that sink, recent frames and the chunk leave positions for mid blocks."""
        # Of a history so long that it has every part.
        segments = partitioner.partition(1000 * self.train_frames, chunk_frames)
        has_mid = any(segment.part == "mid" for segment in segments)
        rigid = chunk_frames + sum(len(s.frames) for s in segments if s.part != "mid") * has_mid
        if rigid >= self.train_frames:
            raise InvalidOptionError(
                f"reindexer fit needs train_frames > {rigid} (sink, recent and current chunk), got "
                f"{self.train_frames}; keep fewer frames whole, or choose another re-indexer"
            )
