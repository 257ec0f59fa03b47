"""Attend blocks spread evenly over the past; a baseline for PackForcing's selection (arXiv 2603.25730, section 5)."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from kvpack.errors import require_int
from kvpack.memory.roles import Candidates, Query, Selector
from kvpack.memory.sending import sent


@dataclass(frozen=True)
class UniformSelector(Selector):
    """Chooses `topk` blocks at equal distances, from the first archived one to the last; a single one is the middle.

    Args:
        topk: blocks chosen.

    Raises:
        InvalidOptionError: if `topk` is negative.

    >>> UniformSelector(topk=2).limit(5)
    2
    """

    topk: int = 16
    name = "uniform"
    by_head = True

    def __post_init__(self) -> None:
        require_int("topk", self.topk)

    def limit(self, candidates: int) -> int:
        """Return at most `topk`."""
        return min(self.topk, candidates)

    def select(self, query: Query, candidates: Candidates) -> Int[Tensor, "batch chosen"]:
        """Return evenly spread indices, halves rounded up; the same for every batch row."""
        chosen = self.limit(candidates.count)
        last, gaps = candidates.count - 1, chosen - 1
        # In whole numbers: no two can be equal, and no device rounds otherwise.
        picks = [(2 * i * last + gaps) // (2 * gaps) for i in range(chosen)] if gaps else [(last + 1) // 2]
        return sent(torch.tensor(picks, dtype=torch.long), query.queries.device).expand(query.queries.shape[0], -1)
