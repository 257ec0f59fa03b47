"""Students at work: a compressor that any stack takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.trained.students import Hybrid, Kept, Student
from kvpack.memory.blocks import KVBlock, Span
from kvpack.policies.keep import KeepCompressor

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class TrainedKeep(KeepCompressor):
    """Stands `Kept` or `Hybrid` for a block.

    Args:
        weights: folder of them.
        how: as that of `Kept`, or "hybrid".
        summaries: of `Hybrid`; the other tokens are kept.
    """

    weights: str = field(default="", kw_only=True)
    how: str = field(default="offset", kw_only=True)
    summaries: int = field(default=1, kw_only=True)
    name = "trained-keep"

    def choose(self, block: KVBlock, grid: tuple[int, int], count: int) -> Int[Tensor, "batch kept"]:
        """Raise `TypeError`: `compress` does it all."""
        raise TypeError("trained-keep chooses in compress")

    def compress(self, block: KVBlock, grid: tuple[int, int]) -> KVBlock:
        """Return what the student makes of the block."""
        student = loaded(self.weights, self.how, self.count(block.span.frames, grid), self.summaries)
        part = student.blocks(block.layer, block.keys[:, None], block.values[:, None])
        return KVBlock(
            part.keys[:, 0], part.values[:, 0], Span(block.span.first_frame, block.span.frames, part.places[:, 0])
        )


@cache
def loaded(weights: str, how: str, tokens: int, summaries: int) -> Student:
    """Return a student with its weights."""
    student = Hybrid(tokens - summaries, summaries, 1) if how == "hybrid" else Kept(tokens, 1, how)
    student.load_state_dict(load_file(f"{weights}/{WEIGHTS}"))
    return student.requires_grad_(False).eval()
