"""Tosses a coin for every block of the past. An example of a package of one's own; there is no paper."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kvpack
from kvpack.errors import require_int
from kvpack.memory.roles import Candidates, Query
from kvpack.policies.stacks import packforcing


@dataclass(frozen=True)
class CoinSelector(kvpack.Selector):
    """Attends the newest blocks that show heads, and where they are too few the newest that show tails.

    Args:
        topk: blocks chosen.
        seed: of the tosses, which are others in every layer and chunk.
    """

    topk: int = 16
    seed: int = 0
    name = "coin-toss"

    def __post_init__(self) -> None:
        require_int("topk", self.topk)
        require_int("seed", self.seed)

    def heads(self, layer: int, chunk: int, blocks: int) -> list[bool]:
        """Return a toss for each block."""
        return np.random.default_rng((self.seed, layer, chunk)).integers(2, size=blocks).astype(bool).tolist()

    def limit(self, candidates: int) -> int:
        """At most `topk`."""
        return min(self.topk, candidates)

    def select(self, query: Query, candidates: Candidates) -> Tensor:
        """Return the same blocks for every batch row."""
        heads = self.heads(query.layer, query.chunk, candidates.count)
        best_first = sorted(range(candidates.count), key=lambda block: (heads[block], block), reverse=True)
        chosen = torch.tensor(best_first[: self.topk], device=query.queries.device)
        return chosen.expand(query.queries.shape[0], -1)


def coin_packforcing(*, topk: int = 16, seed: int = 0) -> kvpack.Stack:
    """Build the memory of PackForcing with a coin in the place of its scores."""
    return replace(packforcing(selector=CoinSelector(topk, seed)), name="coin-packforcing")


@kvpack.hookimpl
def kvpack_register_policies(register: Callable[[Any], None]) -> None:
    """One policy."""
    register(CoinSelector)


@kvpack.hookimpl
def kvpack_register_stacks(register: Callable[[str, Any], None]) -> None:
    """One stack, whose options are the function's."""
    register("coin-packforcing", coin_packforcing)
