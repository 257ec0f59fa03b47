"""Where keys and values lie: each once, behind handles.

A layer's `Arena` holds what is attended, in attended order. One `Workspace` serves all layers of a session.
"""

from collections.abc import Callable, Iterable, Sequence
from weakref import ref

import torch
from jaxtyping import Float
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


class StoredBlock:
    """Keys and values of one layer that never change, wherever they lie.

    A block lies in arenas, where it is attended in place, or in tensors of its own. An arena that needs the place for
    something else moves it out first, as long as anyone holds the handle.

    Args:
        tokens: number of tokens.
        own: keys and values `[batch, tokens, heads, head_dim]`, of a block that lies in no arena.
    """

    __slots__ = ("__weakref__", "_own", "places", "tokens")

    def __init__(self, tokens: int, own: KeysValues | None = None) -> None:
        self.tokens, self._own = tokens, own
        #: First token in each arena that holds the block.
        self.places: dict[Arena, int] = {}

    def __len__(self) -> int:
        return self.tokens

    @property
    def keys(self) -> Float[Tensor, "batch tokens heads head_dim"]:
        """Keys; before RoPE, unless the memory keeps rotated ones."""
        return self.resolved()[0]

    @property
    def values(self) -> Float[Tensor, "batch tokens heads head_dim"]:
        """Values."""
        return self.resolved()[1]

    @property
    def own(self) -> tuple[Tensor, ...]:
        """Tensors that nothing but the block holds."""
        return self._own or ()

    def part(self, some: slice) -> "StoredBlock":
        """Return a block of some of these tokens that keeps no others alive, unless they lie in an arena."""
        start, stop, _ = some.indices(self.tokens)
        if self._own is not None:
            parts = [each[:, start:stop] for each in self._own]
            # A part is copied, or it would keep the rest alive.
            keys, values = (each.contiguous() if stop - start == self.tokens else each.clone() for each in parts)
            return StoredBlock(stop - start, (keys, values))
        block = StoredBlock(stop - start)
        for arena, first in self.places.items():
            arena.admit(block, first + start)  # in each, so that it is copied only if it leaves all
        return block

    def placed(self, arena: "Arena", start: int) -> None:
        """Note that an arena holds the block; tensors of its own would hold it twice."""
        self.places[arena], self._own = start, None

    def move_out(self, arena: "Arena") -> None:
        """Leave an arena, for tensors of its own if there is no other."""
        if len(self.places) == 1 and self._own is None:
            keys, values = self.resolved()
            self._own = keys.clone(), values.clone()
        del self.places[arena]  # last: if there is no memory for the copy, the block still lies here

    def resolved(self) -> KeysValues:
        """Return keys and values; views, where the block lies in an arena."""
        if self._own is not None:
            return self._own
        arena, start = next(iter(self.places.items()))  # any of them: all hold the same bits
        first = arena.key_place(start)
        return arena.keys[:, first : first + self.tokens], arena.values[:, start : start + self.tokens]


class Arena:
    """Keys and values of one layer in attended order, the current chunk behind them.

    Tokens in `keyless` have values here alone, and no room for keys.
    """

    def __init__(self) -> None:
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        self.keyless = range(0)
        #: Returns what reads and writes here; None once that is gone, and only blocks keep the arena alive.
        # `object()` is not None: an arena that belongs to no layer is never vacated.
        self.owner: Callable[[], object] = object
        self._residents: list[ref[StoredBlock]] = []  # weak: what nobody holds need not be moved out

    def vacate(self) -> None:
        """Let go of everything, if the owner is gone; blocks that others hold move out."""
        if self.owner() is not None:
            return
        for block in filter(None, [each() for each in self._residents]):
            if self in block.places:  # one that was to come may not have come
                block.move_out(self)
        self.keys, self.values, self._residents = torch.empty(0), torch.empty(0), []

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.keys.nbytes + self.values.nbytes

    def key_place(self, start: int) -> int:
        """Return where the key of a token lies that is not in `keyless`."""
        return start - len(self.keyless) if start >= self.keyless.stop else start

    def admit(self, block: StoredBlock, start: int) -> StoredBlock:
        """Make a block of tokens that are already here."""
        block.placed(self, start)
        self._residents.append(ref(block))
        return block

    def arrange(
        self,
        blocks: Sequence[tuple[int, StoredBlock]],
        tokens: int,
        like: Float[Tensor, "rows any heads head_dim"],
        keyless: range = range(0),
        room: tuple[int, int] = (0, 0),
    ) -> None:
        """Bring blocks to their places, in room for `tokens` tokens; what else lies here is moved out if it is held.

        Args:
            blocks: the first token of each and the block, ascending, none over another.
            tokens: room that is needed.
            like: whose rows, heads, dtype and device these are.
            keyless: tokens between blocks that need no room for keys.
            room: keys and values that there is to be room for if it must grow, since a later chunk needs them.
        """
        # Where keys lie changes with it: all come anew.
        wanted = {id(block) for _, block in blocks} if keyless == self.keyless else set()
        residents = [block for each in self._residents if (block := each()) is not None]
        # Known before they come: if memory is short on the way, whoever lies here is moved out the next time.
        self._residents += [ref(block) for _, block in blocks]
        for block in residents:
            if id(block) not in wanted and self in block.places:  # held by others: its place is needed
                block.move_out(self)
        self.keyless = keyless  # only now: what has left was found by where keys lay before
        sizes = tokens - len(keyless), tokens
        # Each by itself: `keyless` may differ from chunk to chunk.
        if any(held < size for held, size in zip(self._sizes(like), sizes, strict=True)):
            self._grow(blocks, (max(sizes[0], room[0]), max(sizes[1], room[1])), like)  # once, for the largest chunk
        else:
            # A sink block, say, is in its place already.
            self._move([(start, block) for start, block in blocks if block.places.get(self) != start])
        self._residents = [ref(block) for _, block in blocks]
        leave_ended(block for _, block in blocks)

    def write(self, start: int, keys: Tensor | None, values: Tensor) -> None:
        """Write tokens that are no block, from `start` on; those of `keyless` without keys."""
        if keys is not None:
            self.write_keys(start, keys)
        self.values[:, start : start + values.shape[1]] = values

    def write_keys(self, start: int, keys: Tensor) -> None:
        """Write keys whose values are here, from `start` on."""
        first = self.key_place(start)
        self.keys[:, first : first + keys.shape[1]] = keys

    def _sizes(self, like: Tensor) -> tuple[int, int]:
        """Return how many keys and values there is room for, of such rows, heads, dtype and device."""
        held = self.keys
        alike = held.ndim == 4 and (held.shape[0], *held.shape[2:]) == (like.shape[0], *like.shape[2:])
        if not alike or held.dtype != like.dtype or held.device != like.device:
            return 0, 0
        return held.shape[1], self.values.shape[1]

    def _grow(self, blocks: Sequence[tuple[int, StoredBlock]], sizes: tuple[int, int], like: Tensor) -> None:
        # Never for more than is known to be needed, since spare room would be held for good.
        larger = [
            # Neither shrinks: the two grow at different chunks.
            like.new_empty(like.shape[0], max(size, held), *like.shape[2:])
            for size, held in zip(sizes, self._sizes(like), strict=True)
        ]
        for start, block in blocks:
            for new, old, first in zip(larger, block.resolved(), (self.key_place(start), start), strict=True):
                new[:, first : first + len(block)] = old
        self.keys, self.values = larger  # only now: if memory ran out before, all blocks lie where they lay
        for start, block in blocks:
            block.placed(self, start)

    def _move(self, moving: Sequence[tuple[int, StoredBlock]]) -> None:
        # Copied in turn, to places that ascend, one that comes from below its place would write over a later one.
        # So would one that comes from elsewhere (-1).
        if any(block.places.get(self, -1) < start for start, block in moving):
            for _, block in moving:
                if self in block.places:
                    block.move_out(self)
        for start, block in moving:
            keys, values = block.resolved()
            place = block.places.get(self, start)  # no shift for what comes from elsewhere: it overlaps nothing
            # Of values and of keys: they differ where `keyless` lies between the two places.
            shifts = place - start, self.key_place(place) - self.key_place(start)
            if any(shift in range(1, len(block)) for shift in shifts):  # the two places overlap
                keys, values = keys.clone(), values.clone()
            self.write(start, keys, values)
            block.placed(self, start)


def leave_ended(blocks: Iterable[StoredBlock]) -> None:
    """Let blocks, and all that lies beside them, leave arenas whose owner is gone."""
    for arena in {each for block in blocks for each in block.places}:  # a set first: `vacate` changes `places`
        arena.vacate()


class Workspace:
    """Room for rotated keys, and for values that lie apart: filled anew by each layer in each forward."""

    def __init__(self) -> None:
        self._keys = torch.empty(0)
        self._values = torch.empty(0)
        #: What has filled it last.
        self.owner: object = None
        #: Keys and values that each layer's arena is made for, once it is known.
        self.room: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._keys.nbytes + self._values.nbytes

    def keys(self, rows: int, tokens: int, like: Tensor) -> Float[Tensor, "rows tokens heads head_dim"]:
        """Return room for keys."""
        if not _fits(self._keys, rows, tokens, like):
            self.owner, self._keys = None, torch.empty(0)  # first, or the old and the new are there at once
            self._keys = like.new_empty(rows, tokens, *like.shape[2:])
        return self._keys[:rows, :tokens]

    def values(self, rows: int, tokens: int, like: Tensor) -> Float[Tensor, "rows tokens heads head_dim"]:
        """Return room for values."""
        if not _fits(self._values, rows, tokens, like):
            self._values = torch.empty(0)
            self._values = like.new_empty(rows, tokens, *like.shape[2:])
        return self._values[:rows, :tokens]


def _fits(held: Tensor, rows: int, tokens: int, like: Tensor) -> bool:
    """Return whether a room serves; a larger one does, since layers and chunks share it."""
    if held.ndim != 4 or held.shape[0] < rows or held.shape[1] < tokens or held.shape[2:] != like.shape[2:]:
        return False
    return held.dtype == like.dtype and held.device == like.device
