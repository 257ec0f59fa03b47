"""Where the engine keeps keys and values: arenas, archives, pasts that are gone back to, places that depend on data."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import archive, attention, chosen, ledger, placement
from kvpack.memory.blocks import KVBlock, Span, grid_coordinates
from kvpack.memory.layer import LayerCache
from kvpack.memory.roles import Compressor
from kvpack.memory.rope import rotate, rotations
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
from kvpack.memory.store import Arena, StoredBlock, Workspace
from kvpack.planning.resident import resident
from kvpack.plugins.registry import registry
from kvpack.policies import (
    AbsoluteReindexer,
    AllSelector,
    ContiguousReindexer,
    FitReindexer,
    PoolCompressor,
    QueryTopK,
    SinkMidRecentPartitioner,
    WindowPartitioner,
)
from kvpack.policies.quantized import Int8Codec
from kvpack.testing import TINY, run_session
from kvpack.training.buffer import GraphLayer

LIKE = torch.empty(2, 0, 2, 12)
ORDERS = st.permutations(range(5)) | st.lists(st.sampled_from(range(5)), unique=True).map(sorted)
#: Which blocks, behind how many of them the tokens without keys lie, and how many those are.
ARRANGEMENTS = st.tuples(ORDERS, st.integers(0, 4), st.integers(0, 6))


def filled(arena, tokens, sizes):
    """An arena of random numbers with blocks of some sizes, one behind the other; each with copies of what it holds."""
    arena.arrange([], tokens, LIKE)
    source = torch.Generator().manual_seed(0)
    arena.write(0, *torch.randn(2, 2, tokens, 2, 12, generator=source))
    blocks, start = [], 0
    for size in sizes:
        block = arena.admit(StoredBlock(size), start)
        blocks.append((block, block.keys.clone(), block.values.clone()))
        start += size
    return blocks


def same(block, keys, values):
    return torch.equal(block.keys, keys) and torch.equal(block.values, values)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Arenas


@pytest.mark.parametrize("starts", [(0, 4), (1, 5), (3, 7), (0, 8)])  # of which some overlap the places of before
def test_blocks_move_down_in_place(starts, monkeypatch):
    arena = Arena()
    kept = filled(arena, 16, (4, 4, 5))[1:]  # nothing holds the first
    room = arena.keys.data_ptr(), arena.values.data_ptr()
    moved = []
    monkeypatch.setattr(StoredBlock, "move_out", lambda self, arena: moved.append(self))
    arena.arrange([(start, block) for start, (block, *_) in zip(starts, kept, strict=True)], 16, LIKE)
    assert moved == []
    assert room == (arena.keys.data_ptr(), arena.values.data_ptr())
    for start, (block, keys, values) in zip(starts, kept, strict=True):
        assert block.own == ()
        assert block.places == {arena: start}
        assert same(block, keys, values)
        assert torch.equal(arena.keys[:, start : start + len(block)], keys)
        assert torch.equal(arena.values[:, start : start + len(block)], values)


@pytest.mark.parametrize("starts", [(5, 0), (2, 8), (6, 12)])  # in another order, apart, up
def test_blocks_move_anywhere(starts):
    arena = Arena()
    blocks = filled(arena, 17, (5, 5))
    wanted = sorted(zip(starts, (block for block, *_ in blocks), strict=True), key=lambda each: each[0])
    arena.arrange(wanted, 17, LIKE)
    assert [block.places for block, *_ in blocks] == [{arena: start} for start in starts]
    assert all(same(*each) and each[0].own == () for each in blocks)


def test_a_block_that_is_held_is_moved_out_when_its_place_is_needed():
    arena = Arena()
    blocks = filled(arena, 9, (3, 3, 3))
    (held, keys, values), (gone, *_), (kept, *_) = blocks
    blocks[1] = None
    part = held.part(slice(1, 3))
    del gone
    arena.arrange([(0, kept)], 9, LIKE)
    arena.write(3, torch.zeros(2, 6, 2, 12), torch.zeros(2, 6, 2, 12))
    assert held.places == {}
    assert same(held, keys, values)
    assert same(part, keys[:, 1:3], values[:, 1:3])
    assert sum(each.nbytes for each in held.own) == keys.nbytes + values.nbytes
    assert same(kept, *blocks[2][1:])
    arena.arrange([(0, held), (3, kept)], 9, LIKE)  # and comes back
    assert held.own == ()
    assert same(held, keys, values)
    assert same(kept, *blocks[2][1:])


def test_a_block_in_two_arenas_is_copied_only_once_it_leaves_both():
    first, second = Arena(), Arena()
    ((block, keys, values),) = filled(first, 4, (4,))
    second.arrange([(2, block)], 6, LIKE)
    assert block.places == {first: 0, second: 2}
    first.arrange([], 4, LIKE)
    assert (block.places, block.own) == ({second: 2}, ())
    assert same(block, keys, values)
    second.arrange([], 6, LIKE)
    assert len(block.own) == 2
    assert same(block, keys, values)


def test_blocks_that_others_hold_leave_an_arena_whose_owner_is_gone():
    first, second = Arena(), Arena()
    shared, alone, gone = filled(first, 9, (3, 4, 2))
    del gone
    second.arrange([(0, shared[0])], 6, LIKE)
    first.vacate()  # somebody still uses it
    assert len(first.keys[0]) == 9
    first.owner = lambda: None
    second.arrange([(0, shared[0])], 6, LIKE)
    assert first.nbytes == 0
    assert (shared[0].places, shared[0].own) == ({second: 0}, ())
    assert (alone[0].places, len(alone[0].own)) == ({}, 2)
    assert same(*shared)
    assert same(*alone)


@settings(max_examples=60, deadline=None)
@given(st.lists(ARRANGEMENTS, min_size=1, max_size=6))
def test_blocks_are_what_they_were_however_they_lie_about_tokens_without_keys(arrangements):
    arena, sizes = Arena(), (2, 3, 4, 1, 5)
    kept = filled(arena, sum(sizes), sizes)
    rooms = [sum(sizes)] * 2
    for order, before, count in arrangements:
        first = sum(sizes[each] for each in order[:before])
        places, start = [], 0
        for number, each in enumerate(order):
            start += count if number == before else 0
            places.append((start, kept[each][0]))
            start += sizes[each]
        stop = start if len(order) > before else start + count
        arena.arrange(places, stop, LIKE, range(first, first + count))
        arena.write(first, None, torch.zeros(2, count, 2, 12))
        assert all(same(*each) for each in kept)
        assert [block.places[arena] for _, block in places] == [start for start, _ in places]
        rooms = [max(rooms[0], stop - count), max(rooms[1], stop)]
        assert [arena.keys.shape[1], arena.values.shape[1]] == rooms


def test_an_arena_grows_exactly_and_never_shrinks():
    arena = Arena()
    blocks = filled(arena, 8, (4, 4))
    assert arena.nbytes == 2 * 2 * 8 * 2 * 12 * 4
    places = [(0, blocks[0][0]), (5, blocks[1][0])]
    for tokens, size in ((11, 11), (10, 11), (11, 11), (12, 12)):
        arena.arrange(places, tokens, LIKE)
        assert arena.keys.shape == arena.values.shape == (2, size, 2, 12)
        assert all(same(*each) and each[0].own == () for each in blocks)
    with_rows = LIKE.new_empty(2, 0, 2, 12, dtype=torch.float64)
    arena.arrange([], 3, with_rows)
    assert (arena.keys.dtype, arena.keys.shape[1]) == (torch.float64, 3)
    assert all(same(*each) for each in blocks)


def test_a_part_of_a_block_keeps_no_other_part_alive():
    part = StoredBlock(8, (torch.zeros(1, 8, 2, 12), torch.zeros(1, 8, 2, 12))).part(slice(2, 5))
    assert [each.untyped_storage().nbytes() for each in part.own] == [3 * 2 * 12 * 4] * 2


def test_a_block_that_came_before_an_interrupt_leaves_the_next_time(monkeypatch):
    arena, write, calls = Arena(), Arena.write, []
    first, second = filled(arena, 8, (4, 4))
    own = StoredBlock(4, (torch.ones(2, 4, 2, 12), torch.ones(2, 4, 2, 12)))
    keys, values = own.resolved()

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Arena, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            arena.arrange([(0, own), (4, first[0])], 8, LIKE)
    arena.arrange([(0, second[0])], 8, LIKE)
    assert same(own, keys, values)
    assert same(*first)
    assert same(*second)


def test_a_workspace_has_room_for_what_is_asked():
    workspace = Workspace()
    for rows, tokens, dtype in ((1, 8, torch.float32), (2, 4, torch.float32), (1, 2, torch.float64)):
        for room in (workspace.keys, workspace.values):
            made = room(rows, tokens, LIKE.to(dtype))
            assert (made.shape, made.dtype) == ((rows, tokens, 2, 12), dtype)


# Pasts


def stack(selector=None, compressor=None, reindexer=None, partitioner=None, **options):
    return Stack(
        "test",
        partitioner or SinkMidRecentPartitioner(4, 4),
        compressor or PoolCompressor(),
        selector or QueryTopK(2),
        reindexer or ContiguousReindexer(),
        **options,
    )


def test_a_fork_shares_the_archive_until_one_of_them_writes():
    session = Session(stack(), TINY)
    run_session(session, 6, batch=2)
    fork = session.snapshot()
    untouched = Session(stack(), TINY)
    run_session(untouched, 6, batch=2)

    def places(session):
        held = [archive(session, layer) for layer in range(TINY.layers)]
        return [tensor.data_ptr() for each in held for tensor in (*each.keys, *each.values, each.key_sums)]

    assert places(session) == places(fork)
    before, there = archive(fork).keys[0].clone(), places(fork)
    run_session(session, 3, batch=2, seed=5)
    assert not set(places(session)) & set(places(fork))
    assert places(fork) == there
    assert torch.equal(archive(fork).keys[0], before)
    assert equal(run_session(fork, 4, batch=2, seed=7), run_session(untouched, 4, batch=2, seed=7))


@pytest.mark.parametrize("committed", [0, 1])
@pytest.mark.parametrize("commits", [False, True])
def test_an_older_past_has_its_bits_after_a_later_chunk_has_begun(committed, commits):
    session = Session(stack(), TINY)
    run_session(session, 6, batch=2)
    past, twin = session.past, session.snapshot()
    bits = [(kept.block, kept.block.keys.clone(), kept.block.values.clone()) for kept in past.states[0].whole]
    run_session(session, committed, batch=2, seed=3)
    for layer in session.denoise(0):
        layer.attend(*torch.randn(3, 2, 80, TINY.heads, TINY.head_dim), attention)
    if commits:
        for layer in session.commit():
            layer.attend(*torch.randn(3, 2, 80, TINY.heads, TINY.head_dim), attention)
    session.adopt(past)
    assert all(same(*each) for each in bits)
    assert (session.frames, session.layers) == (24, ())
    assert equal(run_session(session, 4, batch=2, seed=7), run_session(twin, 4, batch=2, seed=7))


@pytest.mark.parametrize("name", sorted(registry().stacks))
def test_a_session_goes_on_from_its_state_bit_for_bit(name):
    memory, geometry = registry().stack(name, {}), replace(TINY, grid=(2, 3))
    session = Session(memory, geometry)
    run_session(session, 9, batch=2)
    state = session.state()
    wanted = run_session(session, 5, batch=2, seed=1)  # the first goes on before the other is made
    other = Session(memory, geometry, state)
    assert other.frames == session.frames - 5 * memory.chunk_frames
    assert equal(run_session(other, 5, batch=2, seed=1), wanted)


@pytest.mark.parametrize("rides", [False, True])
def test_a_twin_writes_over_nothing_of_its_chunk(rides):
    memory = stack(compressor=registry().policy("compressor", "lr"), partitioner=SinkMidRecentPartitioner(0, 4))
    session, chunk = Session(memory, TINY), 4 * TINY.tokens_per_frame
    for layer in session.denoise(0):
        layer.attend(*torch.randn(3, 1, chunk, TINY.heads, TINY.head_dim), attention)
    pieces = session.pending_compressions()
    twins = torch.randn(3, 1, session.twin_span(pieces[0]).tokens, TINY.heads, TINY.head_dim)
    given = [torch.randn(3, 1, chunk, TINY.heads, TINY.head_dim) for _ in session.caches]
    for layer, qkv in zip(session.commit(pieces if rides else ()), given, strict=True):
        layer.attend(*(torch.cat([qkv, twins], dim=2) if rides else qkv), attention)
    if not rides:
        with pytest.raises(ZeroDivisionError):  # and is done again
            session.compress(pieces[0])[0].attend(*twins, lambda *_: 1 // 0)
    for layer in () if rides else session.compress(pieces[0]):
        layer.attend(*twins, attention)
    session.finish_commit()
    for state, (_, keys, values) in zip(session.past.states, given, strict=True):
        assert same(state.whole[0].block, keys, values)


@pytest.mark.parametrize("options", [{}, {"topk": 2, "sink_frames": 6}], ids=["in-place", "gathered"])
def test_views_of_larger_tensors_are_not_held(options):
    memory, tokens = registry().stack("packforcing", options), 4 * TINY.tokens_per_frame
    session = Session(memory, TINY)
    for _ in range(8):
        for announce in (lambda: session.denoise(0), session.commit):
            for layer in announce():
                layer.attend(*torch.randn(4, 1, tokens, TINY.heads, TINY.head_dim)[:3], attention)
        session.finish_commit()
    assert session.stats()["resident_bytes"] == resident(TINY, memory, 8, 1).bytes(TINY.layers)


# Keys that are kept after RoPE


class ReadRotated(Stack):
    """Keeps keys before RoPE, whatever its policies."""

    keeps_rotated = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sink_frames", [0, 3])
def test_keys_that_are_kept_rotated_are_those_that_are_rotated_on_read(sink_frames, dtype):
    kept = stack(AllSelector(), None, AbsoluteReindexer(), WindowPartitioner(12, sink_frames))
    read = ReadRotated(**{name: getattr(kept, name) for name in kept.__dataclass_fields__})
    assert (kept.keeps_rotated, read.keeps_rotated) == (True, False)
    geometry, found = replace(TINY, dtype=dtype), []
    for memory in (kept, read):
        session, seen = Session(memory, geometry), []

        def look(session, seen=seen):
            seen.extend(tensor.clone() for layer in range(TINY.layers) for tensor in session.attended(layer))

        outputs = run_session(session, 8, batch=2, inspect=look)
        found.append([*outputs, *seen])
    assert equal(*found)


# Places that depend on the data


@dataclass(frozen=True)
class Loudest(Compressor):
    """Keeps the tokens with the largest keys, of each row, or of each row's heads, where they sit."""

    by_head: bool = False
    tokens: int = 6
    name = "test-loudest"

    @property
    def places(self):
        return "head" if self.by_head else "row"

    def span(self, first_frame, frames, grid):
        return Span(first_frame, frames, grid_coordinates(frames, grid)[: self.tokens])

    def compress(self, block, grid):
        loud = block.keys.square().sum(-1)  # (rows, tokens, heads)
        if not self.by_head:
            loud = loud.sum(-1, keepdim=True)
        index = loud.topk(self.tokens, dim=1).indices.sort(dim=1).values
        places = grid_coordinates(block.span.frames, grid)[index]  # (rows, kept, one or heads, 3)
        wide = index.expand(-1, -1, block.keys.shape[2])[..., None].expand(-1, -1, -1, block.keys.shape[3])
        span = Span(block.span.first_frame, block.span.frames, places if self.by_head else places[:, :, 0])
        return KVBlock(block.keys.gather(1, wide), block.values.gather(1, wide), span)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("selector", [AllSelector(), QueryTopK(2)])
@pytest.mark.parametrize("reindexer", [ContiguousReindexer(), FitReindexer(20), AbsoluteReindexer()])
@pytest.mark.parametrize("sizes", [(4, 4), (6, 3)])  # blocks of one size, or of several
def test_tokens_are_attended_where_they_sit(by_head, selector, reindexer, sizes):
    memory = stack(selector, Loudest(by_head), reindexer, SinkMidRecentPartitioner(*sizes))
    session, source = Session(memory, TINY), torch.Generator().manual_seed(0)
    frame, compressor, heard = TINY.tokens_per_frame, memory.compressor, [[] for _ in session.caches]
    found = []
    for _ in range(7):
        for announce in (lambda: session.denoise(0), session.commit):
            given = [torch.randn(3, 2, 4 * frame, TINY.heads, TINY.head_dim, generator=source) for _ in session.caches]
            for layer, qkv in zip(announce(), given, strict=True):
                layer.attend(*qkv, attention)
        found = []
        for index, chunks in enumerate(heard):
            keys, values = (tensor.clone() for tensor in session.attended(index))
            for row in range(2):
                expected, places = reference(session, index, row, chunks)
                length = session.caches[index].context.lengths[row]
                torch.testing.assert_close(keys[row : row + 1, :length], expected[0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(values[row : row + 1, :length], expected[1])
                found.append(places)
        session.finish_commit()
        for chunks, (_, keys, values) in zip(heard, given, strict=True):
            chunks.append((keys, values))
    assert ledger(session).archive
    assert compressor.tokens < 4 * frame
    assert len({tuple(places.flatten().tolist()) for places in found}) == len(found)  # other ones in each row and layer


@pytest.mark.parametrize("store", ["dense", "int8"])
@pytest.mark.parametrize("by_head", [False, True])
@torch.no_grad()
def test_training_attends_them_there_too(by_head, store):
    memory = replace(stack(compressor=Loudest(by_head)), store=registry().policy("codec", store))
    plain, graph = (run_session(Session(memory, TINY, layer=layer), 6, batch=2) for layer in (LayerCache, GraphLayer))
    for one, other in zip(plain, graph, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_step_that_failed_while_it_decoded_is_done_again(monkeypatch):
    """Layer 1 fails in the room that it shares with layer 0, which must not attend what is then left there."""
    session = Session(registry().stack("packforcing", {"topk": 2, "store": "int8"}), TINY)
    run_session(session, 6)
    shape = (3, 1, session.coming_frames * TINY.tokens_per_frame, TINY.heads, TINY.head_dim)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for layer in session.denoise(0):
        layer.attend(*given, attention)
    first, second, *_ = session.denoise(1)
    right = first.attend(*given, attention)

    def broken(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Int8Codec, "decode_keys", broken)
        with pytest.raises(torch.OutOfMemoryError):
            second.attend(*given, attention)
    assert torch.equal(session.denoise(1)[0].attend(*given, attention), right)


def reference(session, index, row, chunks):
    """Rotated keys and values of history that a row of a layer attends, from all that was ever committed."""
    frame, book, compressor = TINY.tokens_per_frame, ledger(session), session.stack.compressor
    given, picks = placement_of(session, index, row)
    parts = [[piece for piece in book.whole if piece.part == part] for part in ("sink", "recent")]
    pieces = [*((piece, False) for piece in parts[0]), *((book.archive[pick], True) for pick in picks)]
    pieces += [(piece, False) for piece in parts[1]]
    keys, values, own = [], [], [torch.zeros(0)]
    for block, (piece, small) in enumerate(pieces):
        some = slice(piece.first_frame * frame, piece.stop * frame)
        k, v = (torch.cat(each, dim=1)[row : row + 1, some] for each in zip(*chunks, strict=True))
        places = grid_coordinates(piece.frames, TINY.grid)[None]
        if small:
            made = compressor.compress(KVBlock(k, v, Span(piece.first_frame, piece.frames, places[0])), TINY.grid)
            k, v, places = made.keys, made.values, made.span.coordinates
            own.append(places.flatten())
        start, ratio = given.starts[block], given.lengths[block] / piece.frames
        places = places.double().clone()
        places[..., 0] = start + (places[..., 0] + 0.5) * ratio - 0.5
        keys.append(rotate(k, rotations(places, TINY)))
        values.append(v)
    nothing = torch.zeros(1, 0, TINY.heads, TINY.head_dim)
    return (torch.cat([nothing, *keys], dim=1), torch.cat([nothing, *values], dim=1)), torch.cat(own)


def placement_of(session, index, row):
    """Where a row's blocks are placed, and which of the mid they are."""
    selected = chosen(session, index)
    picks = list(range(session.plan.chosen)) if selected is None else selected[row].tolist()
    given = session.plan.place(picks, torch.device("cpu")).placement
    assert session.plan.uniform or selected is None or len(picks) == session.plan.chosen
    if session.plan.uniform:
        other = placement(session, index)
        same_row = min(row, other.starts.shape[0] - 1)
        assert torch.equal(other.starts[same_row], given.starts[0])
    return replace(given, starts=given.starts[0], lengths=given.lengths[0]), picks


@pytest.mark.parametrize("tokens", [16, 40])  # in the same room, and in a larger one
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("keyless", [range(0), range(8, 10)], ids=str)
def test_no_memory_while_blocks_are_arranged(at, tokens, keyless, monkeypatch):
    """Whatever could not be brought to its place is whole, and is brought there the next time."""
    arena, left = Arena(), [at]
    kept = filled(arena, 16, (4, 4, 4))
    own = StoredBlock(4, tuple(torch.randn(2, 2, 4, 2, 12, generator=torch.Generator().manual_seed(1))))
    kept.append((own, own.keys, own.values))

    def scarce(function):
        def call(*given):
            left[0] -= 1
            if left[0] == -1:
                raise torch.OutOfMemoryError
            return function(*given)

        return call

    wanted = [(0, own), (4, kept[1][0]), (10, kept[0][0])]
    with monkeypatch.context() as patch:
        for name in ("clone", "new_empty"):
            patch.setattr(torch.Tensor, name, scarce(getattr(torch.Tensor, name)))
        try:
            arena.arrange(wanted, tokens, LIKE, keyless)
        except torch.OutOfMemoryError:
            assert all(same(*each) for each in kept)
    for again in (wanted, [(0, kept[2][0])], wanted):
        arena.arrange(again, tokens, LIKE, keyless)
        assert all(same(*each) for each in kept)
        assert [block.places[arena] for _, block in again] == [start for start, _ in again]
