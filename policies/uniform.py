"""Attend blocks spread evenly over the past; a baseline for PackForcing's selection (arXiv 2603.25730, section 5)."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from kvpack.memory.roles import Candidates, Query
from kvpack.memory.sending import sent
from kvpack.policies.topk import TopK


@dataclass(frozen=True)
class UniformSelector(TopK):
    """Chooses `topk` blocks at equal distances, from the first archived one to the last; a single one is the middle.

    Raises:
        InvalidOptionError: if `topk` is negative.
    """

    name = "uniform"

    def select(self, query: Query, candidates: Candidates) -> Int[Tensor, "batch chosen"]:
        """Return evenly spread indices, halves rounded up; the same for every batch row."""
        chosen = self.limit(candidates.count)
        last, gaps = candidates.count - 1, chosen - 1
        # In whole numbers: no two can be equal, and no device rounds otherwise.
        picks = [(2 * i * last + gaps) // (2 * gaps) for i in range(chosen)] if gaps else [(last + 1) // 2]
        return sent(torch.tensor(picks, dtype=torch.long), query.queries.device).expand(query.queries.shape[0], -1)
