"""Attend the archived blocks that would take the most attention (after PackForcing, arXiv 2603.25730, section 5)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvpack.errors import require_int
from kvpack.memory.roles import Candidates, Query
from kvpack.policies.topk import QueryTopK

#: Blocks that are scored in one product: at 832x480, 256 queries and 182 tokens a block, 36 MB of float32.
_TOGETHER = 16


@dataclass(frozen=True)
class SoftmaxMassSelector(QueryTopK):
    """Chooses the `topk` blocks with the largest share of attention: log-sum-exp of q . k / sqrt(d) over a block.

    Differs from the paper's sum of q . k: one key that matches well counts, however many others do not. It needs the
    keys themselves: `max_queries` * heads products for each archived token. A block of more tokens takes more
    attention, so that the score isn't divided by their number. Ties go to the later block.

    Args:
        topk: blocks chosen.
        after_rope: score keys and queries at their positions in the video.
        max_queries: most queries that are scored, spread evenly over the chunk.

    Raises:
        InvalidOptionError: if `topk` is negative, or `max_queries` less than 1.

    >>> SoftmaxMassSelector(topk=2).limit(5)
    2
    """

    max_queries: int = 256
    name = "softmax-mass"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("max_queries", self.max_queries, minimum=1)

    def scores(self, query: Query, candidates: Candidates) -> Float[Tensor, "batch blocks"]:
        """Average the logarithm of a block's softmax mass over heads and scored queries."""
        queries = query.rotated() if self.after_rope else query.queries
        step = -(-queries.shape[1] // self.max_queries)
        some = queries[:, ::step].float() / queries.shape[-1] ** 0.5  # (b, i, h, d)
        keys = candidates.rotated_keys if self.after_rope else candidates.keys

        def masses(blocks: list[Tensor]) -> Float[Tensor, "batch some_blocks"]:
            products = torch.einsum("bihd,bmjhd->bmhij", some, torch.stack(blocks, dim=1).float())
            return products.logsumexp(dim=4).mean(dim=(2, 3))

        every = (keys(block) for block in range(candidates.count))
        return query.mean_heads(torch.cat([masses(each) for each in _alike(every)], dim=1))


def _alike(blocks: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield consecutive blocks of one size together, a few at a time: products, or keys, of all are never held."""
    together: list[Tensor] = []
    for block in blocks:
        if together and (len(together) == _TOGETHER or block.shape[1] != together[0].shape[1]):
            yield together
            together = []
        together.append(block)
    if together:
        yield together
