"""Attend the archived blocks that would take the most attention (after PackForcing, arXiv 2603.25730, section 5)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvpack.errors import require_int
from kvpack.memory.roles import Candidates, Query
from kvpack.policies.topk import QueryTopK


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

        def mass(block: int) -> Float[Tensor, " batch"]:
            products = torch.einsum("bihd,bjhd->bhij", some, keys(block).float())
            return products.logsumexp(dim=3).mean(dim=(1, 2))

        return torch.stack([mass(block) for block in range(candidates.count)], dim=1)
