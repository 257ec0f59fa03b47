"""The two stores of a layer: the packed buffer that is attended, and the archive of compressed blocks."""

from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from kvpack.memory.rope import rotate

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@runtime_checkable
class AttendingLayer(Protocol):
    """What an attention processor talks to."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        """Attention of the current tokens to the memory and to themselves."""
        ...


class PackedBuffer:
    """Rotated keys and values of one layer in attended order: history first, the current chunk right behind it.

    A denoising step writes only behind the history and attends one contiguous view; nothing is concatenated.
    """

    #: Whether gradients pass; not through memory that is written in place.
    differentiable: ClassVar[bool] = False

    def __init__(self) -> None:
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        #: Tokens of history, one number a batch row; rows differ only if chosen blocks do.
        self.lengths: list[int] = []

    def clear(self, rows: int, capacity: int, like: Float[Tensor, "rows tokens heads head_dim"]) -> None:
        """Empties the buffer and makes room for `capacity` tokens; grows by a quarter or more at once."""
        held = self.keys.shape[1] if self.keys.ndim == 4 else 0
        if held < capacity or self.keys.dtype != like.dtype or self.keys.device != like.device:
            room = max(capacity, held + held // 4)
            self.keys = like.new_empty(rows, room, *like.shape[2:])
            self.values = torch.empty_like(self.keys)
        self.lengths = [0] * rows

    def append(
        self,
        rows: slice,
        keys: Float[Tensor, "some tokens heads head_dim"],
        values: Float[Tensor, "some tokens heads head_dim"],
        turns: Complex[Tensor, "any tokens one_or_heads half"],
    ) -> None:
        """Adds history behind the history of these rows."""
        start = self.lengths[rows][0]
        self._write(rows, start, keys, values, turns)
        self.lengths[rows] = [start + keys.shape[1]] * keys.shape[0]

    def attend(
        self,
        queries: Float[Tensor, "rows tokens heads head_dim"],
        keys: Float[Tensor, "rows tokens heads head_dim"],
        values: Float[Tensor, "rows tokens heads head_dim"],
        turns: Complex[Tensor, "any tokens one_or_heads half"],
        attention: Attention,
    ) -> Float[Tensor, "rows tokens heads head_dim"]:
        """Writes the current keys and values, or the last of them, behind the history and attends both."""
        queries, turns = rotate(queries, turns), turns[:, turns.shape[1] - keys.shape[1] :]
        results = []
        for rows in self._equal_rows():
            start = self.lengths[rows][0]
            stop = start + keys.shape[1]
            self._write(rows, start, keys[rows], values[rows], turns[rows] if turns.shape[0] > 1 else turns)
            results.append(attention(queries[rows], self.keys[rows, :stop], self.values[rows, :stop]))
        return results[0] if len(results) == 1 else torch.cat(results)

    def _equal_rows(self) -> list[slice]:
        if len(set(self.lengths)) == 1:
            return [slice(0, len(self.lengths))]
        return [slice(row, row + 1) for row in range(len(self.lengths))]

    def _write(self, rows: slice, start: int, keys: Tensor, values: Tensor, turns: Tensor) -> None:
        stop = start + keys.shape[1]
        rotate(keys, turns, out=self.keys[rows, start:stop])
        self.values[rows, start:stop] = values


class Archive:
    """Compressed blocks of one layer in equal slots: keys before RoPE, values, and the sum of each block's keys."""

    def __init__(self, slot_tokens: int) -> None:
        self.slot_tokens = slot_tokens
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        self.key_sums = torch.empty(0)

    @property
    def slots(self) -> int:
        """Slots allocated."""
        return self.keys.shape[1] if self.keys.ndim == 5 else 0

    def write(
        self,
        slot: int,
        keys: Float[Tensor, "rows tokens heads head_dim"],
        values: Float[Tensor, "rows tokens heads head_dim"],
    ) -> None:
        """Puts a block into a free slot; grows by a quarter where there is none."""
        if slot >= self.slots:
            rows, _, heads, head_dim = keys.shape
            more = max(4, self.slots // 4, slot + 1 - self.slots)
            shape = (rows, more, self.slot_tokens, heads, head_dim)
            sums = torch.zeros(rows, more, heads, head_dim, dtype=torch.float32, device=keys.device)
            self.key_sums = _extended(self.key_sums, sums)
            self.values = _extended(self.values, values.new_zeros(shape))
            # Last, since `slots` goes by it: an interrupt before it leaves room that is made again.
            self.keys = _extended(self.keys, keys.new_zeros(shape))
        tokens = keys.shape[1]
        self.keys[:, slot, :tokens] = keys
        self.values[:, slot, :tokens] = values
        self.key_sums[:, slot] = keys.float().sum(dim=1)

    def gather(
        self, rows: slice, slots: Int[Tensor, "some chosen"], tokens: int
    ) -> tuple[Float[Tensor, "some all heads head_dim"], Float[Tensor, "some all heads head_dim"]]:
        """Keys and values of the chosen slots, the first `tokens` of each, joined; every row has its own choice."""
        index = torch.arange(slots.shape[0], device=slots.device)[:, None]
        return (
            self.keys[rows, :, :tokens][index, slots].flatten(1, 2),
            self.values[rows, :, :tokens][index, slots].flatten(1, 2),
        )

    def clone(self) -> "Archive":
        """An independent copy."""
        copy = Archive(self.slot_tokens)
        copy.keys, copy.values, copy.key_sums = self.keys.clone(), self.values.clone(), self.key_sums.clone()
        return copy


def _extended(old: Tensor, more: Tensor) -> Tensor:
    """`old` with the slots of `more` behind its own."""
    return torch.cat([old, more], dim=1) if old.ndim == more.ndim else more
