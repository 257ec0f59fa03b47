"""One layer of a stack's past, and what a chunk attends of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvpack.memory.archive import Archive, Encoded
from kvpack.memory.attribution import policy_call
from kvpack.memory.base import Attended, Chunk
from kvpack.memory.blocks import KVBlock, Span, check_block
from kvpack.memory.ledger import BlockEntry
from kvpack.memory.plan import at
from kvpack.memory.roles import Compressor
from kvpack.memory.rope import joined_places, rotations
from kvpack.memory.sending import sent
from kvpack.memory.sharded import with_all_heads, with_own_heads
from kvpack.memory.stack_plan import Placed, StackPlan
from kvpack.memory.store import KeysValues, StoredBlock
from kvpack.memory.tokens import Tokens, taken


@dataclass(frozen=True, eq=False)
class KeptBlock:
    """A block at full resolution, and its compressed twin if that was made at commit.

    Args:
        first_token: index of its first token in the history.
        block: its keys and values.
        twin: those of the tokens that will stand for it.
    """

    first_token: int
    block: StoredBlock
    twin: tuple[Float[Tensor, "rows tokens heads head_dim"], Float[Tensor, "rows tokens heads head_dim"]] | None = None


@dataclass(frozen=True, eq=False)
class StackState:
    """One layer of a stack's past.

    Args:
        whole: what is kept at full resolution, as the ledger lists it.
        archive: compressed blocks, in the slots that the ledger says.
        tokens: committed tokens.
        leaving: blocks on their way into a slot, which may still hold a block of the past before.
    """

    whole: tuple[KeptBlock, ...]
    archive: Archive
    tokens: int = 0
    leaving: tuple[tuple[int, Encoded], ...] = ()


def new_blocks(chunk: Chunk, plan: StackPlan) -> Iterator[KeptBlock]:
    """Yield the chunk in the pieces that it is kept in."""
    each, block = chunk.geometry.tokens_per_frame, chunk.tokens.block
    assert block is not None
    for piece in plan.new_pieces:
        cut = slice((piece.first_frame - chunk.first_frame) * each, (piece.stop - chunk.first_frame) * each)
        yield KeptBlock(piece.first_frame * each, block.part(cut), chunk.twins.get(piece))


def with_places(block: KVBlock) -> KVBlock:
    """Return a block whose tokens have places of their own, be they the announced ones."""
    if block.own_places is not None:
        return block
    # A view for all rows is enough, since it is copied into a slot.
    places = sent(block.span.coordinates, block.keys.device).expand(len(block.keys), -1, -1)
    return replace(block, span=replace(block.span, coordinates=places))


def merged_block(compressor: Compressor, pieces: Sequence[BlockEntry], archive: Archive, chunk: Chunk) -> KVBlock:
    """Return one block for several archived ones, which follow each other."""
    assert chunk.plan is not None
    geometry, places = chunk.geometry, archive.coordinates
    assert places is not None  # `with_places` gave all blocks some
    count = compressor.span(0, pieces[0].block_frames, geometry.grid).tokens

    def block(piece: BlockEntry) -> KVBlock:
        span = Span(piece.first_frame, piece.frames, places[:, piece.slot, :count])
        keys, values = archive.block_keys(piece.slot, count), archive.block_values(piece.slot, count)
        return with_all_heads(compressor, geometry, KVBlock(keys, values, span, layer=chunk.layer))

    whole = block(pieces[0])  # `merged` takes two: the oldest first, then each newer one
    for piece in pieces[1:]:
        newer = block(piece)
        with policy_call(compressor, "merged", chunk.plan.book.seconds, chunk.layer):
            merged = compressor.merged(whole, newer, geometry.grid)
        check_block(compressor, merged, newer.span, newer.keys, chunk.layer, "merged")
        whole = merged
    return with_own_heads(compressor, geometry, whole)


def attended_tokens(
    state: StackState,
    plan: StackPlan,
    rows: slice,
    chosen: Tensor | list[int] | None,
    chunk: Chunk,
    selected: Tensor | None,
) -> Attended:
    """Return sink, chosen mid and recent blocks of some rows at their positions.

    Args:
        state: the layer's past.
        plan: the chunk.
        rows: which rows.
        chosen: indices of mid blocks of all rows, or the list of one row; None is all blocks.
        chunk: the chunk in this layer.
        selected: the choice of all rows, for `stats()` and for layers that share it.
    """
    device = chunk.queries.device
    placed, archive = plan.place(chosen, device), state.archive

    def whole(indices: list[int], first: int) -> list[Tokens]:
        tokens = []
        for position, index in enumerate(indices, first):
            block = state.whole[index].block
            keys, values = block.resolved()
            tokens.append(Tokens(keys[rows], values[rows], placed.of(position, position + 1), block=block))
        return tokens

    first, last = len(plan.sink), len(plan.sink) + plan.chosen
    mid = _mid(archive, plan, rows, chosen, placed, chunk)
    parts = (*whole(plan.sink, 0), *mid, *whole(plan.recent, last))
    shared: tuple[Tensor, ...] | None = None
    if plan.shares(chosen):
        shared = (placed.rotations,)
        if archive.coordinates is not None and mid:  # each layer has tokens at places of its own
            middle = rotations(joined_places([each.coordinates for each in mid]), plan.geometry)
            shared = shared[0][:, : placed.edges[first]], middle, shared[0][:, placed.edges[last] :]
    return Attended(
        parts,
        placed.placement.chunk_start,
        state,
        rotations=shared,
        selected=selected,
        candidates=len(plan.mid),
        shared=selected if plan.stack.share_selection else None,
        suspect=placed.suspect,
    )


def _mid(
    archive: Archive, plan: StackPlan, rows: slice, chosen: Tensor | list[int] | None, placed: Placed, chunk: Chunk
) -> list[Tokens]:
    """Return the chosen archived blocks, in one where they are of one size."""
    if not plan.chosen:
        return []
    if plan.uniform:
        device, index = chunk.queries.device, chosen
        if not isinstance(index, Tensor):
            index = torch.arange(plan.chosen, device=device)[None]
        # A wrong index is told at the end of the chunk; until then it must not crash the device.
        slots = plan.on(device)[0][index.clamp(0, len(plan.mid) - 1)]
        slots = slots.expand(chunk.queries[rows].shape[0], -1)
        keys, values, later = archive.gather(rows, slots, plan.tokens[0])
        return [Tokens(keys, values, _own_places(archive, rows, slots, plan, placed), later=later)]
    tokens = []
    for column, block in enumerate(range(plan.chosen) if chosen is None else chosen):
        piece, count, first = plan.mid[int(block)], plan.tokens[int(block)], len(plan.sink) + column
        place = placed.of(first, first + 1)
        # Stored places are of tokens as archived: a block that has shrunk sits where `shrunk_span` says.
        if archive.coordinates is not None and not plan.levels[int(block)]:
            own = archive.coordinates[rows, piece.slot, :count]
            place = at(own, placed.placement.starts[:, first], placed.ratios[:, first])
        tokens.append(Tokens(*_archived(archive, plan, rows, int(block), chunk), place))
    return tokens


def _own_places(archive: Archive, rows: slice, slots: Tensor, plan: StackPlan, placed: Placed) -> Tensor:
    """Return the places of chosen blocks, which are the archive's if they depend on the data."""
    first = len(plan.sink)
    if archive.coordinates is None:
        return placed.of(first, first + plan.chosen)
    own = taken(archive.coordinates[rows, :, : plan.tokens[0]], slots).flatten(1, 2)  # (rows, tokens, [heads,] 3)
    columns = slice(placed.edges[first], placed.edges[first + plan.chosen])
    return at(own, placed.begins[:, columns], placed.squeezed[:, columns])


def _archived(archive: Archive, plan: StackPlan, rows: slice, block: int, chunk: Chunk) -> KeysValues:
    """Return a mid block as it is attended."""
    piece, tokens, level = plan.mid[block], plan.tokens[block], plan.levels[block]
    keys, values = archive.block_keys(piece.slot, tokens, rows), archive.block_values(piece.slot, tokens, rows)
    if not level:
        return keys, values
    compressor = plan.stack.compressor
    seen = with_all_heads(compressor, plan.geometry, KVBlock(keys, values, plan.spans[piece.block_frames]))
    with policy_call(compressor, "shrunk", plan.ledger.seconds, chunk.layer):
        shrunk: Any = compressor.shrunk(seen, plan.geometry.grid, level)
    check_block(compressor, shrunk, plan.attended[block], seen.keys, chunk.layer, "shrunk")
    own = with_own_heads(compressor, plan.geometry, shrunk)
    return own.keys, own.values
