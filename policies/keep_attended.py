"""Keep tokens that take most attention when they leave the recent frames (after H2O, arXiv 2306.14048)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from kvpack.memory.blocks import KVBlock
from kvpack.policies.keep import KeepCompressor


@dataclass(frozen=True)
class AttendedCompressor(KeepCompressor):
    """Keeps the tokens that the queries of the chunk attend most at whose commit a block is compressed.

    Attention is the softmax over the block's tokens of q . k / sqrt(d), before RoPE, averaged over queries and heads.

    Differs from the paper: one chunk's queries count, spread evenly, and all heads keep the same tokens.
    """

    name = "keep-attended"
    max_queries: ClassVar[int] = 256

    def choose(self, block: KVBlock, grid: tuple[int, int], count: int) -> Int[Tensor, "batch kept"]:
        """Choose by the attention that keys receive."""
        if block.queries is None:
            raise TypeError("keep-attended needs the chunk's queries; give the block `queries`")
        some = block.queries.float() / block.keys.shape[-1] ** 0.5
        products = torch.einsum("bihd,bjhd->bhij", some, block.keys.float())
        # Softmax over the block alone: what else is attended then is not known here.
        return products.softmax(dim=3).mean(dim=(1, 2)).topk(count, dim=1).indices
