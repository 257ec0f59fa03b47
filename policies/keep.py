"""Compressed blocks that are some of a block's own tokens: keys and values as they were, where they were."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory.blocks import KVBlock, Span, joined
from kvpack.memory.roles import Compressor, Places
from kvpack.memory.tokens import taken
from kvpack.policies.farthest import unlike
from kvpack.policies.pool import pooled_grid


@dataclass(frozen=True)
class KeepCompressor(Compressor):
    """Base of compressors that keep some tokens of a block and drop the others.

    Tokens are chosen for each batch row, layer and block; all heads of a layer keep the same ones.

    Args:
        keep_tokens: tokens kept of a block, or a share of them below 1; None keeps as many as `pool` makes, 1/32. A
            block that has fewer is kept whole.

    Raises:
        InvalidOptionError: if it is neither a whole number from 1 on nor a share above 0 and below 1.
    """

    keep_tokens: int | float | None = field(default=None, kw_only=True)
    places: ClassVar[Places] = "row"

    def __post_init__(self) -> None:
        if isinstance(self.keep_tokens, float):
            if not 0 < self.keep_tokens < 1:
                raise InvalidOptionError(
                    f"keep_tokens must be a whole number, or a share above 0 and below 1, got {self.keep_tokens}"
                )
        elif self.keep_tokens is not None:
            require_int("keep_tokens", self.keep_tokens, minimum=1)

    def count(self, frames: int, grid: tuple[int, int]) -> int:
        """Return how many tokens of a block of `frames` frames are kept.

        >>> from kvpack.policies import FarthestCompressor
        >>> [FarthestCompressor(keep_tokens=each).count(4, (4, 4)) for each in (None, 16, 0.5, 100)]
        [2, 16, 32, 64]
        """
        all_tokens = frames * prod(grid)
        if self.keep_tokens is None:
            return prod(pooled_grid(frames, grid))
        wanted = round(self.keep_tokens * all_tokens) if isinstance(self.keep_tokens, float) else self.keep_tokens
        return min(all_tokens, max(1, wanted))

    def span(self, first_frame: int, frames: int, grid: tuple[int, int]) -> Span:
        """Return as many tokens as are kept, at places spread over the block; where they sit, each block says."""
        count = self.count(frames, grid)
        return Span(first_frame, frames, _places(torch.arange(count) * (frames * prod(grid)) // count, grid))

    def compress(self, block: KVBlock, grid: tuple[int, int]) -> KVBlock:
        """Return the chosen tokens, in the order that they have in the block."""
        chosen = self.choose(block, grid, self.count(block.span.frames, grid))
        return self.at([block], grid, chosen)[0]

    def at(self, blocks: Sequence[KVBlock], grid: tuple[int, int], chosen: Int[Tensor, "rows kept"]) -> list[KVBlock]:
        """Return the chosen tokens of a block in one or more layers; `chosen` has the rows of all, layer by layer."""
        first_frame, frames = blocks[0].span.first_frame, blocks[0].span.frames
        index = chosen.sort(dim=1).values  # in the order of the block, whatever a policy's own
        places, rows = _places(index, grid), len(index) // len(blocks)
        return [
            KVBlock(*self.kept(block, mine), Span(first_frame, frames, coordinates))
            for block, mine, coordinates in zip(blocks, index.split(rows), places.split(rows), strict=True)
        ]

    def merged(self, older: KVBlock, newer: KVBlock, grid: tuple[int, int]) -> KVBlock:
        """Return as many tokens of two blocks as one of them has."""
        both, count = joined(older, newer), older.keys.shape[1]
        index = self.among(both, count).sort(dim=1).values
        span = replace(both.span, coordinates=taken(both.span.coordinates, index))
        return replace(both, keys=taken(both.keys, index), values=taken(both.values, index), span=span)

    def among(self, both: KVBlock, count: int) -> Int[Tensor, "batch kept"]:
        """Return indices of the `count` kept tokens of two blocks that stay: unless overridden, the most unlike.

        They are told by all heads, so that a compressor that is `by_head` must override it.
        """
        return unlike(both.keys, count)

    @abstractmethod
    def choose(self, block: KVBlock, grid: tuple[int, int], count: int) -> Int[Tensor, "batch kept"]:
        """Return indices of the `count` tokens of each row that are kept, in any order."""

    def kept(
        self, block: KVBlock, index: Int[Tensor, "batch kept"]
    ) -> tuple[Float[Tensor, "batch kept heads head_dim"], Float[Tensor, "batch kept heads head_dim"]]:
        """Return keys and values of the tokens at `index`, which ascends."""
        return taken(block.keys, index), taken(block.values, index)


def _places(index: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return (t, y, x) of a block's tokens, with an axis of three behind those of their indices."""
    cells, columns = prod(grid), grid[1]
    return torch.stack([index // cells, index % cells // columns, index % columns], dim=-1).float()
