"""Attend blocks drawn at random; a baseline for PackForcing's selection (arXiv 2603.25730, section 5)."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvpack.errors import require_int
from kvpack.memory.roles import Candidates, Query
from kvpack.memory.sending import sent
from kvpack.policies.topk import TopK


@dataclass(frozen=True)
class RandomSelector(TopK):
    """Draws `topk` blocks anew for each chunk and layer, the same ones for every batch row and guidance branch.

    The draw is a function of seed, chunk, layer and the number of candidates; no global generator is read or moved.

    Args:
        seed: of the draws.

    Raises:
        InvalidOptionError: if `topk` or `seed` is negative.
    """

    seed: int = 0
    name = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("seed", self.seed)

    def select(self, query: Query, candidates: Candidates) -> Int[Tensor, "batch chosen"]:
        """Draw distinct indices, each set as likely as any other."""
        # NumPy's, which mixes the three numbers and draws alike on every device.
        generator = np.random.default_rng((self.seed, query.chunk, query.layer))
        picks = generator.permutation(candidates.count)[: self.topk].tolist()
        return sent(torch.tensor(picks, dtype=torch.long), query.queries.device).expand(query.queries.shape[0], -1)
