"""Keep tokens whose keys are far from their mean (KeyDiff, arXiv 2504.15364)."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import normalize

from kvpack.memory.blocks import KVBlock
from kvpack.policies.keep import KeepCompressor


@dataclass(frozen=True)
class KeyDiffCompressor(KeepCompressor):
    """Keeps the tokens whose keys before RoPE are least like the mean of a block's keys, by cosine.

    Differs from the paper: cosines are averaged over heads, so that all heads keep the same tokens.
    """

    name = "keep-keydiff"

    def choose(self, block: KVBlock, grid: tuple[int, int], count: int) -> Int[Tensor, "batch kept"]:
        """Choose by the keys alone."""
        unit = normalize(block.keys.float(), dim=-1)
        # The mean of directions, as in the paper: length does not count.
        anchor = normalize(unit.mean(dim=1, keepdim=True), dim=-1)
        return (unit * anchor).sum(dim=(2, 3)).topk(count, dim=1, largest=False).indices
