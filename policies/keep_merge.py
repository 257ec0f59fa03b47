"""Keep some tokens and average each other one into the kept one that it is most like (ToMe, arXiv 2210.09461)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from kvpack.memory.blocks import KVBlock
from kvpack.policies.farthest import joined_heads
from kvpack.policies.keep_farthest import FarthestCompressor


@dataclass(frozen=True)
class MergeCompressor(FarthestCompressor):
    """Keeps the tokens that `keep-farthest` keeps, as means of all tokens that are most like them, at their places.

    Differs from the paper, which halves tokens by bipartite matching in every layer: here the kept ones are chosen
    first, and a mean does not count for more in attention than a single token.
    """

    name = "keep-merge"

    def kept(
        self, block: KVBlock, index: Int[Tensor, "batch kept"]
    ) -> tuple[Float[Tensor, "batch kept heads head_dim"], Float[Tensor, "batch kept heads head_dim"]]:
        """Return means of keys, and of values."""
        unit, count = joined_heads(block.keys), index.shape[1]
        centres = unit.gather(1, index[..., None].expand(-1, -1, unit.shape[2]))
        owner = (unit @ centres.transpose(1, 2)).argmax(dim=2)  # (batch, tokens), of (batch, tokens, kept)
        # A kept token stays its own: of two alike, argmax would take one for both, and leave the other 0 / 0.
        owner = owner.scatter(1, index, torch.arange(count, device=index.device).expand_as(index))
        share = one_hot(owner, count).transpose(1, 2).float()  # (batch, kept, tokens)
        share = share / share.sum(dim=2, keepdim=True)
        keys, values = (_averaged(share, each) for each in (block.keys, block.values))
        return keys, values


def _averaged(
    share: Float[Tensor, "batch kept tokens"], tokens: Float[Tensor, "batch tokens heads head_dim"]
) -> Float[Tensor, "batch kept heads head_dim"]:
    """Return weighted sums of tokens, in float32 until they are done."""
    sums = share @ tokens.flatten(2).float()  # (batch, kept, heads * head_dim)
    return sums.to(tokens.dtype).unflatten(2, tokens.shape[2:])  # (batch, kept, heads, head_dim)
