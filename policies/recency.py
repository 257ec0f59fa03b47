"""Attend the latest archived blocks: first in, first out."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from kvpack.errors import require_int
from kvpack.memory.roles import Candidates, Query, Selector, as_indices


@dataclass(frozen=True)
class RecencySelector(Selector):
    """Chooses the last `topk` blocks; the baseline of PackForcing's ablation (arXiv 2603.25730).

    Args:
        topk: blocks chosen.

    >>> RecencySelector(topk=2).limit(5)
    2
    """

    topk: int = 16
    name = "recency"
    by_head = True

    def __post_init__(self) -> None:
        require_int("topk", self.topk)

    def limit(self, candidates: int) -> int:
        """Return at most `topk`."""
        return min(self.topk, candidates)

    def select(self, query: Query, candidates: Candidates) -> Int[Tensor, "batch chosen"]:
        """Return the last indices."""
        count = candidates.count
        return as_indices(range(count - self.limit(count), count), query.queries.shape[0], query.queries.device)
