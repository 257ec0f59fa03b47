"""Attend the latest archived blocks: first in, first out."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from kvpack.memory.roles import Candidates, Query, as_indices
from kvpack.policies.topk import TopK


@dataclass(frozen=True)
class RecencySelector(TopK):
    """Chooses the last `topk` blocks; the baseline of PackForcing's ablation (arXiv 2603.25730)."""

    name = "recency"

    def select(self, query: Query, candidates: Candidates) -> Int[Tensor, "batch chosen"]:
        """Return the last indices."""
        count = candidates.count
        return as_indices(range(count - self.limit(count), count), query.queries.shape[0], query.queries.device)
