"""Keep tokens on a coarser grid: a stride in time, rows and columns, without any average."""

from dataclasses import dataclass
from functools import cache
from math import log, prod
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from kvpack.memory.blocks import KVBlock, Span, grid_coordinates
from kvpack.memory.roles import Places
from kvpack.policies.keep import KeepCompressor


@dataclass(frozen=True)
class GridCompressor(KeepCompressor):
    """Keeps the middle token of each window of a grid, whatever it holds; a baseline for choices that look.

    Args:
        keep_tokens: as that of all compressors that keep; the largest grid of at most so many tokens is taken, and of
            equally large ones the one whose windows are nearest to cubes.

    >>> GridCompressor(keep_tokens=16).span(0, 4, (4, 4)).tokens, GridCompressor().span(0, 4, (30, 52)).tokens
    (16, 182)
    """

    name = "keep-grid"
    by_head = True
    places: ClassVar[Places] = "span"

    def span(self, first_frame: int, frames: int, grid: tuple[int, int]) -> Span:
        """Return the tokens on the grid."""
        index = _on_grid(frames, grid, self.count(frames, grid), torch.device("cpu"))
        return Span(first_frame, frames, grid_coordinates(frames, grid)[index])

    def among(self, both: KVBlock, count: int) -> Int[Tensor, "batch kept"]:
        """Return every other token, whatever it holds."""
        return (2 * torch.arange(count, device=both.keys.device)).expand(both.keys.shape[0], -1)

    def choose(self, block: KVBlock, grid: tuple[int, int], count: int) -> Int[Tensor, "batch kept"]:
        """Return the same tokens for every row."""
        return _on_grid(block.span.frames, grid, count, block.keys.device).expand(block.keys.shape[0], -1)

    def compress(self, block: KVBlock, grid: tuple[int, int]) -> KVBlock:
        """Return the tokens on the grid."""
        span = self.span(block.span.first_frame, block.span.frames, grid)
        index = self.choose(block, grid, self.count(block.span.frames, grid))
        return KVBlock(*self.kept(block, index), span)


@cache
def _on_grid(frames: int, grid: tuple[int, int], most: int, device: torch.device) -> Int[Tensor, " kept"]:
    """Return indices, ascending, of the largest grid of at most `most` tokens; copied to a device once."""
    t, y, x = max(_sizes(frames, grid, most), key=lambda each: (prod(each), _evenness(each, frames, grid)))
    times, rows, columns = (_middles(size, kept) for size, kept in ((frames, t), (grid[0], y), (grid[1], x)))
    index = (times[:, None, None] * grid[0] + rows[:, None]) * grid[1] + columns  # (t, y, x)
    return index.flatten().to(device)  # (t * y * x,)


def _sizes(frames: int, grid: tuple[int, int], most: int) -> list[tuple[int, int, int]]:
    return [
        (t, y, min(grid[1], most // (t * y)))
        for t in range(1, frames + 1)
        for y in range(1, grid[0] + 1)
        if t * y <= most
    ]


def _evenness(kept: tuple[int, int, int], frames: int, grid: tuple[int, int]) -> float:
    strides = [log(size / each) for size, each in zip((frames, *grid), kept, strict=True)]
    return -(max(strides) - min(strides))


def _middles(size: int, kept: int) -> Int[Tensor, " kept"]:
    return (2 * torch.arange(kept) + 1) * size // (2 * kept)
