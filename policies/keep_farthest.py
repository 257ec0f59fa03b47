"""Keep tokens whose keys are as unlike each other as can be: greedy k-centre (Gonzalez, 1985; cf. arXiv 1708.00489)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from kvpack.errors import require_int
from kvpack.memory.blocks import KVBlock
from kvpack.policies.farthest import farthest, joined_heads, unlike
from kvpack.policies.keep import KeepCompressor


@dataclass(frozen=True)
class FarthestCompressor(KeepCompressor):
    """Keeps the token least like the mean, then again and again the one that is least like all kept ones.

    Likeness is the cosine of keys before RoPE, all heads joined. So everything that a block shows stays in it, be it
    ever so small, and nothing twice.

    With more tokens to keep than `rounds`, a round takes several at once: the least like the kept ones, of each place
    in the frame one before any has two. The block is read once a round, however many tokens are kept.

    Args:
        rounds: most passes over a block; as many as tokens are kept is the exact greedy choice.

    Raises:
        InvalidOptionError: if `rounds` is less than 2.
    """

    rounds: int = field(default=16, kw_only=True)
    name = "keep-farthest"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("rounds", self.rounds, minimum=2)

    def choose(self, block: KVBlock, grid: tuple[int, int], count: int) -> Int[Tensor, "batch kept"]:
        """Choose by the keys alone."""
        return farthest(joined_heads(block.keys), grid[0] * grid[1], count, self.rounds)

    def among(self, both: KVBlock, count: int) -> Int[Tensor, "batch kept"]:
        """Choose in as many rounds as in a block."""
        return unlike(both.keys, count, self.rounds)

    def compress_all(self, blocks: Sequence[KVBlock], grid: tuple[int, int]) -> list[KVBlock]:
        """Choose for a few layers at once: a round is a dozen small kernels, for however many rows."""
        own = type(self).choose is FarthestCompressor.choose and type(self).compress is KeepCompressor.compress
        if not own:  # a subclass says otherwise
            return super().compress_all(blocks, grid)
        keys, count = torch.cat([block.keys for block in blocks]), self.count(blocks[0].span.frames, grid)
        return self.at(blocks, grid, farthest(joined_heads(keys), grid[0] * grid[1], count, self.rounds))
