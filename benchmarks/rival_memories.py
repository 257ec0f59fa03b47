"""What other projects do with keys and values in a chunk, written from their descriptions; see `benchmarks.rivals`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.flashdreams import STEPS, Projections
from kvpack import Geometry
from kvpack.memory.blocks import KVBlock, Span, grid_coordinates
from kvpack.memory.rope import rotate, rotations
from kvpack.policies.keep_grid import GridCompressor
from kvpack.policies.quantized import Int4Codec

SINK, RECENT, FRAMES, WINDOW = 9, 6, 3, 21
MID, ARCHIVED = 16, 128
#: 3 x 7 x 13 of the 4,680 tokens of a chunk.
KEPT = 273 / 4680


def angles(shape: Geometry, places: Iterable[tuple[float, int]]) -> Tensor:
    """Return rotations of consecutive parts, each given by its first place in time and its frames."""
    parts = [grid_coordinates(n, shape.grid).double() + torch.tensor([start, 0, 0]) for start, n in places]
    return rotations(torch.cat(parts)[None], shape)


class Rival(ABC):
    """What the rivals have in common: keys and values of a chunk are handled five times, then kept."""

    #: What turns keys; counted as a kernel where kvpack's is.
    rotate = staticmethod(rotate)

    def __init__(self, shape: Geometry) -> None:
        self.shape, self.index = shape, 0
        self.attended: tuple[Tensor, Tensor] | None = None
        self.turns = torch.empty(0)

    def prepare(self) -> None:
        """Make the coming chunk's angles."""
        self.turns = angles(self.shape, [(self.index * FRAMES, FRAMES)])

    def chunk(self, projected: Projections) -> None:
        """Handle a chunk."""
        _, keys, values = projected
        for step in range(STEPS + 1):
            self.attended = None  # nobody holds what the forward before attended
            self.attended = self.forward(step, keys, values)
        self.keep(keys, values)
        self.index += 1

    def fill(self, projected: Projections) -> None:
        """Make a chunk history, before anything is measured."""
        self.prepare()
        self.chunk(projected)

    @abstractmethod
    def forward(self, step: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a forward attends."""

    def keep(self, keys: Tensor, values: Tensor) -> None:  # noqa: B027  # a rival may write in its forwards
        """Make the chunk history."""

    @abstractmethod
    def resident(self) -> int:
        """Return the bytes held between two chunks."""


class Shift(Rival):
    """A buffer that is shifted through a clone."""

    def __init__(self, shape: Geometry) -> None:
        super().__init__(shape)
        self.room, self.end = WINDOW * shape.tokens_per_frame, 0
        size = 1, self.room, shape.heads, shape.head_dim
        self.buffers = torch.zeros(size, dtype=shape.dtype), torch.zeros(size, dtype=shape.dtype)

    def forward(self, step: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        new = keys.shape[1]
        if step == 0 and self.end + new > self.room:
            for buffer in self.buffers:
                buffer[:, : self.end - new] = buffer[:, new : self.end].clone()
        elif step == 0:
            self.end += new
        first = self.end - new
        for buffer, each in zip(self.buffers, (self.rotate(keys, self.turns), values), strict=True):
            buffer[:, first : self.end] = each
        every_key, every_value = self.buffers
        return every_key[:, : self.end], every_value[:, : self.end]

    def resident(self) -> int:
        return sum(each.nbytes for each in self.buffers)


class Parts(Rival):
    """A sink, compressed blocks and recent chunks.

    Args:
        shape: the model.
        sizes: frames of sink and of recent chunks, of a chunk, and most compressed blocks.
        kept: share of a chunk's tokens that stand for it.
    """

    def __init__(self, shape: Geometry, sizes: tuple[int, int, int, int], kept: float | None) -> None:
        super().__init__(shape)
        sink, recent, self.frames, self.most = sizes
        self.sinks, self.recents = sink // self.frames, recent // self.frames
        self.compressor = GridCompressor(keep_tokens=kept)
        self.sink: list[Any] = []
        self.mid: list[Any] = []
        self.recent: list[Any] = []

    def fill(self, projected: Projections) -> None:
        super().prepare()
        _, keys, values = projected
        self.keep(keys, values)
        self.index += 1

    def keep(self, keys: Tensor, values: Tensor) -> None:
        whole = self.stored(keys, values)
        if len(self.sink) < self.sinks:
            self.sink.append(whole)
            return
        self.recent.append(whole)
        if len(self.recent) > self.recents:
            first, block = self.recent.pop(0)
            span = Span(0, self.frames, grid_coordinates(self.frames, self.shape.grid))
            small = self.compressor.compress(KVBlock(*block, span), self.shape.grid)
            self.mid = [*self.mid, (first, self.packed(small.keys, small.values))][-self.most :]

    def stored(self, keys: Tensor, values: Tensor) -> tuple[int, Any]:
        """Return a chunk as it is held whole, and its first frame."""
        return self.index * self.frames, (keys.clone(), values.clone())

    def packed(self, keys: Tensor, values: Tensor) -> Any:
        """Return a compressed block as it is held."""
        return keys, values

    def resident(self) -> int:
        held = tree_leaves((self.sink, self.mid, self.recent))
        return sum(each.nbytes for each in held if isinstance(each, Tensor))


class Concatenate(Parts):
    """Keys kept rotated, concatenated, cloned and turned on in float64 in every forward."""

    def __init__(self, shape: Geometry) -> None:
        super().__init__(shape, (SINK, RECENT, FRAMES, MID), KEPT)
        exponents = torch.arange(0, shape.rope_split[0], 2, dtype=torch.float64) / shape.rope_split[0]
        rest = torch.zeros(shape.head_dim // 2 - len(exponents), dtype=torch.float64)
        #: Radians that a frame turns each pair of channels; those of rows and columns stay.
        self.frequencies = torch.cat([shape.rope_theta**-exponents, rest])
        self.anchor = 0.0

    def stored(self, keys: Tensor, values: Tensor) -> tuple[int, Any]:
        return self.index * self.frames, (self.rotate(keys, self.turns), values.clone())

    def turned(self, keys: Tensor, frames: float) -> Tensor:
        """Return a block's keys so many frames later."""
        turn = torch.polar(torch.ones_like(self.frequencies), self.frequencies * frames)
        pairs = torch.view_as_complex(keys.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(keys.dtype)

    def forward(self, step: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        blocks = [*self.sink, *self.mid, *self.recent]
        current = self.rotate(keys, self.turns), values
        mid = [torch.stack(each, dim=1).flatten(1, 2) for each in zip(*(pair for _, pair in self.mid), strict=True)]
        parts = [*(pair for _, pair in self.sink), *([mid] if mid else []), *(pair for _, pair in self.recent), current]
        every_key, every_value = (torch.cat([pair[which] for pair in parts], dim=1) for which in (0, 1))
        packed, start, self.anchor = every_key.clone(), 0, float(self.index * self.frames)
        for number, (first, (own, _)) in enumerate(blocks):
            stop = start + own.shape[1]
            place = self.anchor - (len(blocks) - number) * self.frames
            packed[:, start:stop] = self.turned(every_key[:, start:stop], place - first)
            start = stop
        return packed, every_value


class Reconstruct(Parts):
    """Archived blocks in int4, all of them decoded in every forward into a buffer of everything."""

    def __init__(self, shape: Geometry) -> None:
        super().__init__(shape, (8, 4, 4, ARCHIVED), None)
        self.codec = Int4Codec()

    def packed(self, keys: Tensor, values: Tensor) -> Any:
        return keys.shape[1], self.codec.encode_keys(keys), self.codec.encode_values(values)

    def prepare(self) -> None:
        """Make all angles, of blocks one behind the other."""
        blocks = len(self.sink) + len(self.mid) + len(self.recent) + 1
        whole = grid_coordinates(self.frames, self.shape.grid)
        small = self.compressor.span(0, self.frames, self.shape.grid).coordinates
        middle = range(len(self.sink), len(self.sink) + len(self.mid))
        parts = [
            (small if number in middle else whole).double() + torch.tensor([number * self.frames, 0, 0])
            for number in range(blocks)
        ]
        self.turns = rotations(torch.cat(parts)[None], self.shape)

    def forward(self, step: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.shape.dtype
        mid = [
            (self.codec.decode_keys(k, tokens, dtype), self.codec.decode_values(v, tokens, dtype))
            for _, (tokens, k, v) in self.mid
        ]
        parts = [*(pair for _, pair in self.sink), *mid, *(pair for _, pair in self.recent), (keys, values)]
        every_key, every_value = (torch.cat([pair[which] for pair in parts], dim=1) for which in (0, 1))
        del mid
        return self.rotate(every_key, self.turns), every_value
