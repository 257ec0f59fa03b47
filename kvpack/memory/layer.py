"""The memory of one transformer layer: what an attention processor talks to."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from kvpack.errors import PolicyError
from kvpack.memory.attribution import blamed
from kvpack.memory.blocks import KVBlock, check_block
from kvpack.memory.roles import Candidates, Placement, Query
from kvpack.memory.rope import rotate
from kvpack.memory.store import Archive, Attention, PackedBuffer

if TYPE_CHECKING:
    from kvpack.memory.plan import Context

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Turns:
    """Rotations of a layer's context and of its current chunk, and the placement that they come from."""

    placement: Placement
    context: Complex[Tensor, "rows tokens one_or_heads half"]
    chunk: Complex[Tensor, "rows chunk one_or_heads half"]


class LayerMemory:
    """Packed buffer, archive and choice of one layer.

    Args:
        index: index of the layer.
        slot_tokens: most tokens of a compressed block.
        buffer: what is attended.
    """

    def __init__(self, index: int, slot_tokens: int, buffer: PackedBuffer) -> None:
        self.index = index
        self.buffer = buffer
        self.archive = Archive(slot_tokens)
        #: What is attended; told before a forward, the same for all layers. None once the buffer is filled from it.
        self.pending: Context | None = None
        #: Keys before RoPE and values are appended here if not None: only a commit listens.
        self.capture: list[KeysValues] | None = None
        #: Rotations of the current chunk.
        self.chunk_turns: Complex[Tensor, "rows chunk one_or_heads half"] | None = None
        #: Whether a forward's first tokens are the chunk's; rotations, by placement, of twins whose tokens follow.
        self.with_chunk = True
        self.twins: list[Callable[[Placement], Tensor]] = []
        self.placed: list[Turns] = []
        self.chosen: Int[Tensor, "rows chosen"] | None = None

    def attend(
        self,
        queries: Float[Tensor, "rows tokens heads head_dim"],
        keys: Float[Tensor, "rows tokens heads head_dim"],
        values: Float[Tensor, "rows tokens heads head_dim"],
        attention: Attention,
    ) -> Float[Tensor, "rows tokens heads head_dim"]:
        """Attention of the chunk, and of each twin's tokens, to the memory and to themselves.

        Args:
            queries: queries after their norm and before RoPE.
            keys: keys after their norm and before RoPE.
            values: values.
            attention: called with rotated queries, and with keys and values of history and current tokens.
        """
        if self.pending is not None:
            self._fill(self.pending, queries)
            self.pending = None
        turns = [joined([twin(each.placement) for each in self.placed]) for twin in self.twins]
        if self.with_chunk:
            assert self.chunk_turns is not None  # _fill has set them
            turns.insert(0, self.chunk_turns)
        sizes, attended = [each.shape[1] for each in turns], []
        parts = zip(*(each.split(sizes, dim=1) for each in (queries, keys, values)), turns, strict=True)
        for query, key, value, turn in parts:
            self.hear(key, value)
            attended.append(self.buffer.attend(query, key, value, turn, attention))
        return joined(attended, dim=1)

    def hear(
        self, keys: Float[Tensor, "rows tokens heads head_dim"], values: Float[Tensor, "rows tokens heads head_dim"]
    ) -> None:
        """Keeps keys before RoPE and values if a commit listens."""
        if self.capture is not None:
            self.capture.append((keys, values))

    def _fill(self, context: "Context", queries: Tensor) -> None:
        """Chooses, places and rotates the whole history into the buffer: once a chunk."""
        rows = queries.shape[0]
        self.chosen = self._select(context, queries)
        self.buffer.clear(rows, context.capacity, queries)
        if self.chosen is None or context.uniform:
            self.placed = [self._fill_rows(context, slice(0, rows), self.chosen, queries)]
        else:
            # Chosen blocks of unequal size: rows differ in length; the host reads each one's choice and fills it.
            chosen = self.chosen.tolist()
            self.placed = [self._fill_rows(context, slice(r, r + 1), chosen[r], queries) for r in range(rows)]
        self.chunk_turns = joined([turns.chunk for turns in self.placed])

    def _fill_rows(self, context: "Context", rows: slice, chosen: Tensor | list[int] | None, queries: Tensor) -> Turns:
        turns = context.turns(chosen, queries.device)
        start = 0

        def append(keys: Tensor, values: Tensor) -> None:
            nonlocal start
            stop = start + keys.shape[1]
            self.buffer.append(rows, keys, values, turns.context[:, start:stop])
            start = stop

        for piece in context.sink:
            keys, values = piece.layers[self.index]
            append(keys[rows], values[rows])
        if isinstance(chosen, Tensor):
            slots = context.on(queries.device)[0][chosen.clamp(0, len(context.slots) - 1)]
            append(*self.archive.gather(rows, slots, context.tokens[0]))
        else:
            for index in range(len(context.slots)) if chosen is None else chosen:
                append(*self._archived(context, rows, index))
        for piece in context.recent:
            keys, values = piece.layers[self.index]
            append(keys[rows], values[rows])
        # Rotations of history have done their work; where frequencies differ by head they are as large as its keys.
        return replace(turns, context=turns.context[:, :0].clone())

    def _archived(self, context: "Context", rows: slice, index: int) -> KeysValues:
        """A mid block as it is attended."""
        slot, tokens, level = context.slots[index], context.tokens[index], context.levels[index]
        keys, values = self.archive.keys[rows, slot, :tokens], self.archive.values[rows, slot, :tokens]
        if not level:
            return keys, values
        compressor, block = context.stack.compressor, KVBlock(keys, values, context.spans[context.frames[index]])
        with blamed(compressor, "shrunk", context.ledger.seconds, self.index):
            shrunk = compressor.shrunk(block, context.geometry.grid, level)
        check_block(compressor, shrunk, context.attended[index], keys, self.index, "shrunk")
        return shrunk.keys, shrunk.values

    def _select(self, context: "Context", queries: Tensor) -> Int[Tensor, "rows chosen"] | None:
        """Sorted indices of the chosen mid blocks; None if all are attended or none."""
        if context.takes_all:
            return None
        if context.choice is not None:
            return context.choice.to(queries.device)
        slots, tokens = context.on(queries.device)

        def keys(block: int) -> Tensor:
            return self.archive.keys[:, context.slots[block], : context.tokens[block]]

        candidates = Candidates(
            first_frames=context.first_frames,
            frames=context.frames,
            tokens=tokens,
            key_sums=self.archive.key_sums.index_select(1, slots),
            keys=keys,
            rotated_keys=lambda block: rotate(keys(block), context.absolute_turns(block, queries.device)),
        )
        query = Query(
            queries,
            self.index,
            context.chunk,
            rotated=lambda: rotate(queries, context.absolute_turns(None, queries.device)),
        )
        with blamed(context.selector, "select", context.ledger.seconds, self.index):
            chosen = context.selector.select(query, candidates)
        wanted = (queries.shape[0], context.chosen)
        if not isinstance(chosen, Tensor) or chosen.dtype not in (torch.int64, torch.int32):
            kind = chosen.dtype if isinstance(chosen, Tensor) else type(chosen).__name__
            raise self._broken(context, f"returned {kind} in layer {self.index}, but indices are int64")
        if tuple(chosen.shape) != wanted:
            raise self._broken(
                context, f"returned shape {tuple(chosen.shape)} in layer {self.index}, but it must be {wanted}"
            )
        ordered = chosen.long().sort(dim=1).values
        if context.stack.selection == "chunk":
            context.choice = ordered
        return ordered

    def check_choice(self, context: "Context") -> None:
        """Raises `PolicyError` if the choice or placement was wrong; once a chunk, since it waits for the device."""
        for turns in self.placed:
            given = turns.placement
            numbers = torch.cat([given.starts.flatten(), given.lengths.flatten(), given.chunk_start])
            if not bool(numbers.isfinite().all()):
                name = type(context.reindexer).__name__
                raise PolicyError(f"{name}.place returned positions for layer {self.index} that are not finite")
        if self.chosen is None or self.chosen.numel() == 0:
            return
        count = len(context.slots)
        bad = (self.chosen < 0) | (self.chosen >= count)
        if bool(bad.any()):
            index = int(self.chosen[bad][0])
            raise self._broken(context, f"returned index {index}, but layer {self.index} has {count} candidates")
        if bool((self.chosen[:, 1:] == self.chosen[:, :-1]).any()):
            raise self._broken(context, f"returned an index twice in layer {self.index}, but a block is attended once")

    @staticmethod
    def _broken(context: "Context", what: str) -> PolicyError:
        return PolicyError(f"{type(context.selector).__name__}.select {what}")


def joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Parts, behind each other; the only one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
