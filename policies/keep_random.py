"""Keep tokens drawn at random; a baseline for every other choice."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvpack.errors import require_int
from kvpack.memory.blocks import KVBlock
from kvpack.policies.keep import KeepCompressor


@dataclass(frozen=True)
class RandomTokensCompressor(KeepCompressor):
    """Draws the kept tokens anew for each block, the same ones for every batch row, layer and guidance branch.

    The draw is a function of seed and block; no global generator is read or moved.

    Args:
        seed: of the draws.

    Raises:
        InvalidOptionError: if `seed` is negative.
    """

    seed: int = 0
    name = "keep-random"
    by_head = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("seed", self.seed)

    def among(self, both: KVBlock, count: int) -> Int[Tensor, "batch kept"]:
        """Draw distinct tokens, other ones whenever the block has grown."""
        (rows, tokens), stop = both.keys.shape[:2], both.span.first_frame + both.span.frames
        # By where the block ends, which moves on at every merge, while its beginning stays.
        return _drawn(self.seed, stop, tokens, count, both.keys.device).expand(rows, -1)

    def choose(self, block: KVBlock, grid: tuple[int, int], count: int) -> Int[Tensor, "batch kept"]:
        """Draw distinct tokens, each set as likely as any other."""
        rows, tokens = block.keys.shape[:2]
        return _drawn(self.seed, block.span.first_frame, tokens, count, block.keys.device).expand(rows, -1)


@lru_cache(maxsize=8)
def _drawn(seed: int, first_frame: int, tokens: int, count: int, device: torch.device) -> Int[Tensor, " kept"]:
    """Draw for a block, once for all layers."""
    picks = np.random.default_rng((seed, first_frame)).permutation(tokens)[:count]
    return torch.from_numpy(picks).to(device)
