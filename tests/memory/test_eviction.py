"""What a full archive forgets."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import pytest
import torch

from helpers import attention, ledger
from kvpack import Session
from kvpack.errors import InvalidOptionError, UnusedOptionError
from kvpack.memory.blocks import KVBlock, Span, joined
from kvpack.memory.eviction import evicted, merging
from kvpack.memory.ledger import BlockEntry
from kvpack.memory.roles import Places, Selector
from kvpack.memory.rope import rotate, rotations
from kvpack.memory.stack_state import with_places
from kvpack.planning.resident import most_resident, resident
from kvpack.plugins.registry import registry
from kvpack.plugins.resolve import stack_from_dict
from kvpack.policies import FarthestCompressor, PoolCompressor
from kvpack.policies.farthest import farthest, joined_heads
from kvpack.testing import TINY, check_policy, run_session

SIZES = {"topk": 2, "archive_blocks": 6}


def run(chunks, **options):
    session = Session(registry().stack("packforcing", {**SIZES, **options}), TINY)
    return run_session(session, chunks, batch=2), session


def firsts(session):
    return [piece.first_frame for piece in ledger(session).archive]


def test_the_oldest_go_or_the_archive_is_thinned_out():
    assert firsts(run(60)[1]) == list(range(212, 236, 4))
    spread = firsts(run(60, eviction="spread")[1])
    assert (len(spread), spread[0], spread[-1]) == (6, 8, 232)
    gaps = [later - earlier for earlier, later in pairwise(spread)]
    assert gaps == sorted(gaps, reverse=True)


def test_blocks_that_two_rules_keep_are_the_same_bits():
    """Until the archive is full nothing differs; then other blocks are chosen among."""
    (first, _), (other, _) = run(14), run(14, eviction="spread")
    same = [torch.equal(one, two) for one, two in zip(first, other, strict=True)]
    full = 2 + 1 + 6 + 1  # sink, recent, the archive, and the chunk that sees it full
    assert all(same[:full])
    assert not all(same[full:])


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_every_tier_gives_the_same_bits(tier):
    here, there = (torch.cat(run(20, eviction="spread", tier=each)[0], dim=1) for each in ("device", tier))
    assert torch.equal(here, there)


def test_a_resumed_session_forgets_the_same():
    _, session = run(12, eviction="spread")
    again = Session(session.stack, TINY, session.state())
    on, resumed = (run_session(each, 8, batch=2, seed=1) for each in (session, again))
    assert all(torch.equal(one, two) for one, two in zip(on, resumed, strict=True))
    assert firsts(session) == firsts(again)
    assert firsts(session)[0] == 8


def test_the_plan_is_the_same_whatever_goes():
    _, session = run(20, eviction="spread")
    held = resident(TINY, session.stack, 20, 2).bytes(TINY.layers)
    assert held == session.stats()["resident_bytes"]
    most = most_resident(TINY, session.stack, None, 2)
    assert most is not None
    assert most.bytes(TINY.layers) == held


def test_it_is_an_option_of_an_archive_with_a_bound():
    made = registry().stack("packforcing", {"eviction": "spread"})
    assert made.eviction == "spread"
    assert stack_from_dict(made.to_dict()) == made
    with pytest.raises(InvalidOptionError, match="must be one of oldest, spread, least-selected, merged, got 'newest'"):
        registry().stack("packforcing", {"eviction": "newest"})
    with pytest.raises(UnusedOptionError, match="eviction has no effect: packforcing-paper keeps all blocks"):
        registry().stack("packforcing-paper", {"eviction": "spread"})
    with pytest.raises(UnusedOptionError, match="eviction has no effect: self-forcing archives no blocks"):
        registry().stack("self-forcing", {"eviction": "spread"})


def blocks(*firsts, **options):
    return [BlockEntry(first, 4, **options) for first in firsts]


def test_of_fewer_than_three_blocks_the_oldest_goes():
    assert [evicted(blocks(4, 8)[:count], 20, "spread") for count in (1, 2)] == [0, 0]


def test_what_was_never_there_to_be_chosen_stays():
    archive = [*blocks(4, 8, offered=6, chosen=3), *blocks(12, offered=3, chosen=1), *blocks(16)]
    assert evicted(archive, 24, "least-selected") == 2
    assert evicted(blocks(4, 8, 12), 24, "least-selected") == 0


def test_blocks_that_are_no_neighbours_are_not_merged():
    assert merging([BlockEntry(4, 4, slot=0), BlockEntry(12, 4, slot=1)], 24) is None


@dataclass(frozen=True)
class FixedSelector(Selector):
    """Chooses the blocks that begin with one of some frames, or else the newest."""

    frames: tuple[int, ...] = (8, 20)
    name = "fixed"

    def limit(self, candidates):
        return min(candidates, 2)

    def select(self, query, candidates):
        order = sorted(range(candidates.count), key=lambda i: (candidates.first_frames[i] not in self.frames, -i))
        return torch.tensor([order[:2]]).expand(query.queries.shape[0], -1)


@dataclass(frozen=True)
class OldestSelector(Selector):
    """Chooses the oldest blocks, which stay for good then."""

    topk: int = 1
    name = "oldest"

    def limit(self, candidates):
        return min(candidates, self.topk)

    def select(self, query, candidates):
        return torch.arange(self.topk).expand(query.queries.shape[0], -1)


def test_the_block_that_fewest_have_chosen_goes():
    stack = replace(registry().stack("packforcing", SIZES), selector=FixedSelector(), eviction="least-selected")
    session = Session(stack, TINY)
    run_session(session, 9, batch=2)
    # Sink of 8, recent of 4: the archive is full with blocks 8 to 28, and two of them are asked for ever since.
    assert firsts(session) == [8, 12, 16, 20, 24, 28]
    run_session(session, 31, batch=2)
    assert {8, 20} < set(firsts(session))
    assert firsts(session)[-1] == 152
    asked = {piece.first_frame: (piece.chosen, piece.offered) for piece in ledger(session).archive}
    assert asked[8][0] == asked[8][1] > 0
    assert asked[152] == (0, 0)


def test_what_a_replay_attends_is_not_counted():
    _, session = run(9, eviction="least-selected")
    before, replays = ledger(session).archive, session.replays()
    session.rewind(sum(replays))
    for frames in replays:
        session.expect(frames)
        for layer in session.commit():
            layer.attend(*torch.randn(3, 2, frames * TINY.tokens_per_frame, TINY.heads, TINY.head_dim), attention)
        session.finish_commit()
    assert replays
    assert ledger(session).archive == before


@pytest.mark.parametrize("options", [{}, {"compressor": "pool"}, {"compressor": "lr", "selector": "topk"}])
def test_a_merged_archive_reaches_back_to_the_beginning(options):
    _, session = run(60, eviction="merged", **options)
    archive = ledger(session).archive
    assert len(archive) == 6
    assert archive[0].first_frame == 8
    assert all(one.stop == two.first_frame for one, two in pairwise(archive))
    assert archive[-1].stop == 60 * 4 - 4
    assert [each.frames for each in archive] == sorted((each.frames for each in archive), reverse=True)
    assert all(each.block_frames == 4 for each in archive)
    assert resident(TINY, session.stack, 60, 2).bytes(TINY.layers) == session.stats()["resident_bytes"]


@pytest.mark.parametrize("sizes", [{}, {"chunk_frames": 2, "sink_frames": 0, "recent_frames": 3}], ids=str)
def test_a_merged_block_is_the_weighted_mean_of_what_it_stands_for(sizes):
    """Against the blocks of an archive that forgets nothing, of the same keys; two pieces at once make three one."""
    _, session = run(30, eviction="merged", compressor="pool", **sizes)
    _, whole = run(30, compressor="pool", archive_blocks=None, **sizes)
    for state, all_of_it in zip(session.past.states, whole.past.states, strict=True):
        slots = {piece.first_frame: piece.slot for piece in ledger(whole).archive}
        for piece in ledger(session).archive:
            firsts = range(piece.first_frame, piece.stop, piece.block_frames)
            parts = [all_of_it.archive.block_keys(slots[first], 2) for first in firsts]
            torch.testing.assert_close(state.archive.block_keys(piece.slot, 2), torch.stack(parts).mean(dim=0))
            torch.testing.assert_close(state.archive.key_sums[:, piece.slot], torch.stack(parts).mean(dim=0).sum(dim=1))
            places = state.archive.coordinates[:, piece.slot]
            assert float(places[..., 0].mean()) == pytest.approx((piece.frames - 1) / 2)


def test_merged_kept_tokens_are_tokens_of_both_at_their_places():
    policy = FarthestCompressor(keep_tokens=4)
    older, newer = (
        with_places(policy.compress(KVBlock(*torch.randn(2, 2, 64, 2, 8), Span(first, 4, torch.zeros(64, 3))), (4, 4)))
        for first in (8, 12)
    )
    merged = policy.merged(older, newer, (4, 4))
    both = joined(older, newer)
    assert merged.span.frames == 8
    for row in range(2):
        found = [[torch.equal(key, other) for other in both.keys[row]].index(True) for key in merged.keys[row]]
        assert found == sorted(set(found))
        assert torch.equal(merged.span.coordinates[row], both.span.coordinates[row, found])
        assert torch.equal(merged.values[row], both.values[row, found])
    assert torch.equal(both.span.coordinates[:, 4:, 0], newer.span.coordinates[..., 0] + 4)


@pytest.mark.parametrize(
    ("reindexer", "spans"),
    [("contiguous", (4, 4)), ("packed", (2, 2)), ("absolute", (120, 4)), ("sink-shift", (120, 4)), ("fit", (2, 2))],
)
def test_a_merged_block_takes_the_positions_of_one_unless_they_are_those_of_the_video(reindexer, spans):
    """And its tokens lie in these as they lie in its frames, whichever block stands beside it."""
    _, session = run(60, eviction="merged", reindexer=reindexer, **({"train_frames": 20} if reindexer == "fit" else {}))
    archive = ledger(session).archive
    chosen = torch.tensor([[0, 5], [4, 5]])
    plan = session.stack.plan(session.past.book, 4, TINY)
    placed = plan.place(chosen, torch.device("cpu"))
    first = len(plan.sink)
    lengths, starts = (each[:, first : first + 2] for each in (placed.placement.lengths, placed.placement.starts))
    assert lengths[0].tolist() == list(spans)
    frames = torch.tensor([[archive[index].frames for index in row] for row in chosen.tolist()])
    torch.testing.assert_close(placed.ratios[:, first : first + 2], (lengths / frames).expand(2, -1).double())
    if reindexer == "absolute":
        assert starts.tolist() == [[archive[index].first_frame for index in row] for row in chosen.tolist()]


def test_a_layer_attends_merged_tokens_at_their_positions():
    _, session = run(60, eviction="merged")
    seen = []

    def look(session):
        for layer, cache in enumerate(session.caches):
            seen.append((layer, cache.selected, session.attended(layer)[0].clone()))

    before = session.state()  # the commit merges again
    run_session(session, 1, batch=2, inspect=look)
    plan, grid = session.stack.plan(before.book, 4, TINY), TINY.tokens_per_frame
    for layer, selected, keys in seen:
        state, tokens = before.states[layer], plan.tokens[0]
        for row in range(2):
            for column, index in enumerate(selected[row].tolist()):
                piece, length = plan.mid[index], (20 - 4 - 8 - 4) / 2
                start = 8 + column * length
                places = state.archive.coordinates[row, piece.slot].clone()
                places[:, 0] = start + (places[:, 0] + 0.5) * length / piece.frames - 0.5
                wanted = rotate(
                    state.archive.block_keys(piece.slot, tokens)[row : row + 1], rotations(places[None].double(), TINY)
                )
                at = 8 * grid + column * tokens
                torch.testing.assert_close(keys[row : row + 1, at : at + tokens], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [
        {"sink_frames": 6, "recent_frames": 16},
        {"sink_frames": 3, "recent_frames": 6},
        {"sink_frames": 7, "recent_frames": 20, "keep_tokens": 3},
        {"sink_frames": 7, "recent_frames": 20, "keep_tokens": 0.5},
        {"sink_frames": 5, "recent_frames": 12, "compressor": "pool-time"},
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [4, 1])
def test_what_is_planned_is_enough_whichever_blocks_are_selected_least(sizes, first):
    """Blocks of other lengths may stay for good, or go at once."""
    options = {**SIZES, "archive_blocks": 3, "reindexer": "contiguous", "eviction": "least-selected", **sizes}
    made = registry().stack("packforcing", options)
    for selector in (OldestSelector(1), OldestSelector(2), FixedSelector()):
        stack = replace(made, selector=selector)
        session, held = Session(stack, TINY), []
        session.expect(first)
        for chunk in range(24):
            run_session(session, 1, batch=2, seed=chunk)
            held.append(session.stats()["resident_bytes"])
        most = most_resident(TINY, stack, 24, 2, 16, first)
        assert most is not None
        assert max(held) <= most.bytes(TINY.layers)


@pytest.mark.parametrize("rule", ["least-selected", "merged"])
@pytest.mark.parametrize("options", [{}, {"store": "int8"}, {"tier": "host"}, {"tier": "disk"}])
def test_a_fork_and_a_resumed_session_go_on_alike(rule, options):
    _, session = run(12, eviction=rule, **options)
    fork = session.snapshot()
    on, forked = (run_session(each, 8, batch=2, seed=1) for each in (session, fork))
    assert all(torch.equal(one, two) for one, two in zip(on, forked, strict=True))
    assert ledger(session) == ledger(fork)


@pytest.mark.parametrize("rule", ["least-selected", "merged"])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_every_tier_forgets_alike(rule, tier):
    here, there = (torch.cat(run(20, eviction=rule, tier=each)[0], dim=1) for each in ("device", tier))
    assert torch.equal(here, there)


def test_a_block_of_another_length_is_not_merged():
    session = Session(registry().stack("packforcing", {**SIZES, "sink_frames": 0, "eviction": "merged"}), TINY)
    session.expect(1)
    run_session(session, 40, batch=2)
    archive = ledger(session).archive
    assert (archive[0].frames, archive[0].blocks) == (1, 1)
    assert archive[1].blocks > 1


def test_two_at_a_time_become_one_where_two_come_at_once():
    """A window that leaves the middle in two pieces a chunk: each commit archives both."""
    stack = registry().stack("packforcing", {**SIZES, "recent_frames": 2, "sink_frames": 2, "eviction": "merged"})
    session = Session(stack, TINY)
    run_session(session, 40, batch=2)
    archive = ledger(session).archive
    assert len(archive) == 6
    assert archive[0].first_frame == 2
    assert all(one.stop == two.first_frame for one, two in pairwise(archive))


@dataclass(frozen=True)
class NewerCompressor(PoolCompressor):
    """Lets the newer of two blocks stand for both; what it gives back is the archive's own memory."""

    name = "newer"

    def merged(self, older, newer, grid):
        return replace(joined(older, newer), keys=newer.keys, values=newer.values, span=replace(newer.span, frames=8))


def test_a_merged_block_may_be_a_view_of_the_archive():
    _, session = run(20, eviction="merged", compressor=NewerCompressor(), selector="topk")
    _, whole = run(20, compressor="pool", archive_blocks=None)
    state, everything = session.past.states[0], whole.past.states[0]
    slots = {piece.first_frame: piece.slot for piece in ledger(whole).archive}
    for piece in ledger(session).archive:
        newest = everything.archive.block_keys(slots[piece.stop - 4], 2)
        assert torch.equal(state.archive.block_keys(piece.slot, 2), newest)


def test_merging_goes_by_the_rounds_of_the_compressor():
    blocks = [with_places(KVBlock(*torch.randn(2, 1, 8, 2, 8), Span(first, 4, torch.rand(8, 3)))) for first in (8, 12)]
    both = joined(*blocks)
    few, many = (FarthestCompressor(keep_tokens=8, rounds=rounds) for rounds in (2, 16))
    unit = joined_heads(both.keys)
    for policy in (few, many):
        chosen = farthest(unit, 16, 8, policy.rounds).sort(dim=1).values
        assert torch.equal(policy.merged(*blocks, (4, 4)).keys[0], both.keys[0, chosen[0]])
    assert not torch.equal(few.merged(*blocks, (4, 4)).keys, many.merged(*blocks, (4, 4)).keys)


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(InvalidOptionError, match="blocks of compressor geometric cannot be merged"):
        registry().stack("framepack", {"eviction": "merged"})


@dataclass(frozen=True)
class AnywhereCompressor(PoolCompressor):
    places: ClassVar[Places] = "row"
    name = "anywhere"

    def compress(self, block, grid):
        return with_places(super().compress(block, grid))


def test_tokens_that_lie_anywhere_have_no_mean():
    check_policy(AnywhereCompressor())
    with pytest.raises(InvalidOptionError, match="blocks of compressor anywhere cannot be merged"):
        registry().stack("packforcing", {"compressor": AnywhereCompressor(), "eviction": "merged"})
