"""Attend the archived blocks with the highest query-key affinity (PackForcing, arXiv 2603.25730, section 5)."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvpack.errors import require_bool, require_int
from kvpack.memory.roles import Candidates, Query, Selector


@dataclass(frozen=True)
class TopK(Selector):
    """Chooses so many blocks at most; a subclass says which.

    Args:
        topk: blocks chosen.

    >>> QueryTopK(topk=2).limit(5)
    2
    """

    topk: int = 16
    by_head = True

    def __post_init__(self) -> None:
        require_int("topk", self.topk)

    def limit(self, candidates: int) -> int:
        """Return at most `topk`."""
        return min(self.topk, candidates)


@dataclass(frozen=True)
class QueryTopK(TopK):
    """Chooses the `topk` blocks whose keys agree most with the chunk's queries, for each layer and batch row.

    The paper sums q . k over a subsample of queries and half of the heads. The score is bilinear, so summing each side
    first gives it exactly, over all queries and heads, for one small product. It is divided by the block's token
    count; q and k are taken before RoPE, which would favour near blocks. Ties go to the later block.

    Args:
        after_rope: score keys and queries at their positions in the video, as where keys are stored rotated; reads
            every archived key once a chunk and layer.

    Raises:
        InvalidOptionError: if `topk` is negative or `after_rope` is not a bool.
    """

    after_rope: bool = field(default=False, kw_only=True)
    name = "topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bool("after_rope", self.after_rope)

    def scores(self, query: Query, candidates: Candidates) -> Float[Tensor, "batch blocks"]:
        """Average q . k / sqrt(head_dim) over queries, keys and heads, as many heads as there are."""
        queries = (query.rotated() if self.after_rope else query.queries).float().mean(dim=1)  # (b, h, d)
        sums = self._rotated_sums(candidates) if self.after_rope else candidates.key_sums
        keys = (sums / candidates.tokens[None, :, None, None]).to(queries)  # (b, m, h, d)
        heads, head_dim = queries.shape[1:]
        return query.mean_heads(torch.einsum("bhd,bmhd->bm", queries, keys) / (heads * head_dim**0.5))

    @staticmethod
    def _rotated_sums(candidates: Candidates) -> Float[Tensor, "batch blocks heads head_dim"]:
        # Tokens of a block turn differently, so that the sum of its keys cannot be turned for them.
        sums = [candidates.rotated_keys(block).float().sum(dim=1) for block in range(candidates.count)]
        return torch.stack(sums, dim=1)

    def select(self, query: Query, candidates: Candidates) -> Int[Tensor, "batch chosen"]:
        """Return the indices of the best scores."""
        scores = self.scores(query, candidates)
        # Turned round, for a stable sort leaves what is equal in its order: the later block first.
        newest_first = scores.flip(1).argsort(dim=1, descending=True, stable=True)
        return candidates.count - 1 - newest_first[:, : self.topk]
