"""What a layer attends in a chunk, made into two tensors for the attention kernel."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import pad

from kvpack.memory.base import Attended
from kvpack.memory.geometry import Geometry
from kvpack.memory.plan import Plan
from kvpack.memory.rope import joined_places, rotate, rotations
from kvpack.memory.store import Arena, KeysValues, StoredBlock, Workspace, leave_ended
from kvpack.memory.tokens import Later, Tokens

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Rotations = Complex[Tensor, "rows tokens one_or_heads half"]

_BIAS_CHANNELS = 8  # kernels want head sizes that are multiples of it
_HEADS_AT_ONCE = 1024  # tokens; rotations that differ by head are twice as large as keys in bfloat16


class Context(Protocol):
    """Keys and values of history that a layer attends in a chunk."""

    #: Tokens of history of each row.
    lengths: list[int]

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, turns: Rotations, attention: Attention
    ) -> Float[Tensor, "rows tokens heads head_dim"]:
        """Return the attention of rotated queries to history and to the current keys and values.

        Args:
            queries: queries before RoPE.
            keys: keys before RoPE; those of the last queries, if they are fewer.
            values: their values.
            turns: rotations of the queries.
            attention: called with rotated queries, and with keys and values of history and current tokens.
        """
        ...

    def keep(self, keys: Tensor, values: Tensor) -> StoredBlock | None:
        """Store what was attended last as a block, if the memory's blocks are stored by the engine."""
        ...

    def history(self) -> KeysValues:
        """Return rotated keys, and values, of history; rows that are shorter end in anything."""
        ...

    def beside(self, tokens: int) -> Any:
        """Return a context manager in which other tokens are attended in the place of the current ones."""
        ...


class InPlace:
    """History in a layer's arena, in attended order: values are attended where they lie.

    Keys are rotated into the workspace in every forward, unless the memory keeps them rotated.

    Args:
        arena: where the layer's blocks lie.
        workspace: for rotated keys.
        attended: what the memory wants attended.
        like: the chunk's keys.
        plan: the chunk.
        rotated: whether keys are kept after RoPE.
    """

    def __init__(
        self, arena: Arena, workspace: Workspace, attended: Attended, like: Tensor, plan: Plan, *, rotated: bool
    ) -> None:
        assert isinstance(attended.tokens, tuple)
        self.arena, self.workspace, self.geometry, self.rotated = arena, workspace, plan.geometry, rotated
        self.turns = attended.rotations
        self.later: Later | None = None
        blocks, loose, start, keyless = [], [], 0, range(0)
        for tokens in attended.tokens:
            if tokens.block is not None:
                blocks.append((start, tokens.block))
            else:
                loose.append((start, tokens))
            if tokens.later is not None:  # at most one part: chosen blocks come joined
                self.later, keyless = tokens.later, range(start, start + len(tokens))
            start += len(tokens)
        if workspace.room is None:  # once for all layers: the ledger is run far ahead for it
            workspace.room = plan.room()
        # Blocks first: one that has to move may still lie where a loose part goes.
        arena.arrange(blocks, start + like.shape[1], like, keyless, workspace.room)
        for place, tokens in loose:
            arena.write(place, None if place in keyless else tokens.keys, tokens.values)
        self.places = [tokens.coordinates for tokens in attended.tokens]
        self.tokens = start
        self.lengths = [start] * like.shape[0]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, turns: Rotations, attention: Attention) -> Tensor:
        """Attend the arena up to the current tokens."""
        start, stop = self.tokens, self.tokens + keys.shape[1]
        # Keys that are kept rotated are attended where they lie, without a working buffer.
        room = self.arena.keys if self.rotated else self._rotated_history(stop)
        # Keys of the last queries, if some are hidden.
        rotate(keys, turns[:, turns.shape[1] - keys.shape[1] :], out=room[:, start:stop])
        self.arena.values[:, start:stop] = values  # a commit copies no values: `keep` makes a block of these
        return attention(rotate(queries, turns), room[:, :stop], self.arena.values[:, :stop])

    def keep(self, keys: Tensor, values: Tensor) -> StoredBlock:
        """Make a block of the current tokens, whose values are already there."""
        if not self.rotated:  # else `attend` has rotated them into their place
            self.arena.write_keys(self.tokens, keys)
        return self.arena.admit(StoredBlock(keys.shape[1]), self.tokens)

    def history(self) -> KeysValues:
        """Return views, which hold until the next forward of any layer."""
        keys = self.arena.keys if self.rotated else self._rotated_history(self.tokens)
        return keys[:, : self.tokens], self.arena.values[:, : self.tokens]

    @contextmanager
    def beside(self, tokens: int) -> Iterator[None]:
        """Save the values that other tokens write over."""
        place = slice(self.tokens, self.tokens + tokens)
        saved = self.arena.values[:, place].clone()  # values alone: keys are rotated into the workspace
        try:
            yield
        finally:
            self.arena.values[:, place] = saved

    def _rotated_history(self, stop: int) -> Tensor:
        like = self.arena.values
        # As large as the arena, or it would grow chunk by chunk.
        room = self.workspace.keys(like.shape[0], max(stop, like.shape[1]), like)
        if self.workspace.owner is self:  # filled already: for a twin in the same forward, or for `history`
            return room
        self.workspace.owner = None  # until it is filled: what fails on the way is done again
        first = start = 0
        for turns in self._turns():  # in pieces, where the middle of each layer has places of its own
            for keys in self._keys(first, first + turns.shape[1]):
                end = start + keys.shape[1]
                rotate(keys, turns[:, start - first : end - first], out=room[:, start:end])
                start = end
            first += turns.shape[1]
        self.workspace.owner = self
        return room

    def _keys(self, start: int, stop: int) -> Iterator[Tensor]:
        """Yield keys of a run of history, in order; it has all tokens without keys here, or none of them."""
        # If no keys come later, `apart` is range(0), and the last branch yields all.
        arena, apart = self.arena, self.arena.keyless
        if start < apart.start:
            yield arena.keys[:, start : min(stop, apart.start)]
        if self.later is not None and start <= apart.start < stop:
            yield from self.later()
        if stop > apart.stop:
            yield arena.keys[:, arena.key_place(max(start, apart.stop)) : arena.key_place(stop)]

    def _turns(self) -> tuple[Tensor, ...]:
        if self.turns is not None:
            return self.turns
        return (rotations(joined_places(self.places), self.geometry),) if self.places else ()


class Gathered:
    """History that lies apart: copied into the workspace in every forward, for all rows or for each by itself.

    Args:
        workspace: for rotated keys and for values.
        attended: what the memory wants attended.
        like: the chunk's keys.
        geometry: the model.
        stores: whether the memory's blocks are stored by the engine.
    """

    def __init__(
        self, workspace: Workspace, attended: Attended, like: Tensor, geometry: Geometry, *, stores: bool
    ) -> None:
        rows = like.shape[0]
        self.workspace, self.geometry, self.stores = workspace, geometry, stores
        if isinstance(attended.tokens, list):
            self.groups = [(slice(row, row + 1), tokens) for row, tokens in enumerate(attended.tokens)]
        else:
            self.groups = [(slice(0, rows), attended.tokens)]
        self.lengths = [sum(map(len, tokens)) for _, tokens in self.groups for _ in range(rows // len(self.groups))]
        if stores:
            # As `Arena.arrange` does, which these blocks never see: the arenas of an ended stream would stay.
            leave_ended(each.block for _, tokens in self.groups for each in tokens if each.block is not None)
        self.like = like.new_empty(rows, 0, *like.shape[2:])  # a view would keep the forward's keys alive
        self.biases = [_bias_of(tokens, like) for _, tokens in self.groups]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, turns: Rotations, attention: Attention) -> Tensor:
        """Attend the workspace."""
        # Keys of the last queries, if some are hidden.
        queries, turns = rotate(queries, turns), turns[:, turns.shape[1] - keys.shape[1] :]
        results = []
        for (rows, tokens), bias in zip(self.groups, self.biases, strict=True):
            every_key, every_value, start = self._filled(tokens, keys[rows])
            rotate(keys[rows], turns[rows] if turns.shape[0] > 1 else turns, out=every_key[:, start:])
            every_value[:, start:] = values[rows]
            if bias is None:
                results.append(attention(queries[rows], every_key, every_value))
            else:
                results.append(biased(queries[rows], every_key, every_value, bias, attention))
        return results[0] if len(results) == 1 else torch.cat(results)

    def keep(self, keys: Tensor, values: Tensor) -> StoredBlock | None:
        """Store copies, if the engine stores blocks."""
        # Copies, since views would keep the forward's tensors alive.
        return StoredBlock(keys.shape[1], (keys.clone(), values.clone())) if self.stores else None

    def history(self) -> KeysValues:
        """Return copies."""
        longest, rows = max(self.lengths), len(self.lengths)
        shape = (rows, longest, *self.like.shape[2:])
        keys, values = self.like.new_zeros(shape), self.like.new_zeros(shape)
        for some, tokens in self.groups:
            every_key, every_value, length = self._filled(tokens, self.like[some])
            keys[some, :length], values[some, :length] = every_key, every_value
        return keys, values

    @contextmanager
    def beside(self, tokens: int) -> Iterator[None]:
        """Do nothing: nothing current is held here."""
        yield

    def _filled(self, parts: tuple[Tokens, ...], current: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return room for history and current tokens, the history in it, and how many tokens that is."""
        total = sum(map(len, parts))
        size = current.shape[0], total + current.shape[1], current
        every_key, every_value, start = self.workspace.keys(*size), self.workspace.values(*size), 0
        self.workspace.owner = self  # or a layer in place would take these keys for its own
        # In one pass where all heads and rows share them: part by part it is many small launches.
        turns = _turns_of(parts, self.geometry)
        for tokens in parts:
            stop = start + len(tokens)
            if turns is not None:
                rotate(tokens.keys, turns[:, start:stop], out=every_key[:, start:stop])
            else:
                _rotate_into(every_key[:, start:stop], tokens, self.geometry)
            every_value[:, start:stop] = tokens.values
            start = stop
        return every_key, every_value, total


def _bias_of(parts: tuple[Tokens, ...], like: Tensor) -> Tensor | None:
    """Return the bias of each token; None if there is none."""
    if not any(each.bias for each in parts):
        return None
    return torch.cat([like.new_full((len(each),), each.bias) for each in parts])


def _turns_of(parts: tuple[Tokens, ...], geometry: Geometry) -> Rotations | None:
    """Return the rotations of all parts, if they are the same for all heads and rows."""
    places = [each.coordinates for each in parts]
    # By head they would be larger than the keys (`_HEADS_AT_ONCE`).
    if geometry.rotary is not None or any(each.ndim == 4 or each.shape[0] > 1 for each in places):
        return None
    return rotations(torch.cat(places, dim=1), geometry) if places else None


def _rotate_into(room: Tensor, tokens: Tokens, geometry: Geometry) -> None:
    by_head = tokens.coordinates.ndim == 4 or geometry.rotary is not None
    step = _HEADS_AT_ONCE if by_head else max(1, len(tokens))
    for start in range(0, len(tokens), step):
        some = slice(start, start + step)
        rotate(tokens.keys[:, some], rotations(tokens.coordinates[:, some], geometry), out=room[:, some])


def biased(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, attention: Attention) -> Tensor:
    """Return attention with a number added to the logits of the first keys, exactly and without a mask.

    A channel is added in which every query is 1 and a key has its bias; the new head size is made up for.

    Args:
        queries: rotated queries.
        keys: rotated keys.
        values: values.
        bias: of the first keys; the rest have none.
        attention: scales by the root of the head size.
    """
    head_dim = queries.shape[-1]
    wide = head_dim + _BIAS_CHANNELS
    added = pad(bias.to(keys) * wide**0.5, (0, keys.shape[1] - bias.shape[0]))  # attention divides by that root
    extra = pad(added[None, :, None, None].expand(*keys.shape[:3], 1), (0, _BIAS_CHANNELS - 1))
    ones = pad(torch.ones_like(queries[..., :1]), (0, _BIAS_CHANNELS - 1))
    scaled = queries * (wide / head_dim) ** 0.5  # attention divides by the new head size
    out = attention(
        torch.cat([scaled, ones], dim=-1), torch.cat([keys, extra], dim=-1), pad(values, (0, _BIAS_CHANNELS))
    )
    return out[..., :head_dim]
