"""Arenas are made for the largest chunk of the video: once, and for no more."""

from dataclasses import dataclass, replace

import pytest

from helpers import room
from kvpack import Session
from kvpack.memory.room import FAR, arena_room
from kvpack.memory.stack import Stack
from kvpack.planning.resident import most_resident, resident
from kvpack.plugins.registry import registry
from kvpack.policies.recency import RecencySelector
from kvpack.testing import TINY, run_session

STACKS = [name for name in registry().names("stack") if isinstance(registry().stack(name, {}), Stack)]
ENDLESS = [name for name in STACKS if name != "full"]


def arenas(session):
    """Where each layer's keys and values lie, and how many there is room for."""
    pairs = [(each.arena.keys, each.arena.values) for each in session.caches]
    return [(each.data_ptr(), each.shape[1]) for pair in pairs for each in pair]


def run(session, chunks):
    """The arenas behind each chunk, and the most tokens that any chunk attended, its own included."""
    seen, most, own = [], 0, session.stack.chunk_frames * session.geometry.tokens_per_frame
    for chunk in range(chunks):
        run_session(session, 1, seed=chunk)
        seen.append(arenas(session))
        most = max(most, session.stats()["attended_tokens"] + own)
    return seen, most


@pytest.mark.parametrize("store", ["dense", "int8"])
@pytest.mark.parametrize("chunks", [1, 3, 9, 30])
@pytest.mark.parametrize("name", STACKS)
def test_an_arena_is_made_once_for_a_video_of_known_length(name, chunks, store):
    stack = registry().stack(name, {"store": store} if "packforcing" in name else {})
    session = Session(stack, replace(TINY, frames=chunks * stack.chunk_frames))
    seen, most = run(session, chunks)
    assert seen == [seen[0]] * chunks
    assert room(session) == most == arena_room(stack, session.geometry, stack.chunk_frames)[1]
    assert resident(session.geometry, stack, chunks, 1).bytes(TINY.layers) == session.stats()["resident_bytes"]


def test_rotated_keys_have_room_once_too():
    session = Session(registry().stack("packforcing", {"topk": 2}), replace(TINY, frames=36))
    seen = [run_session(session, 1, seed=chunk) and session.stats()["workspace_bytes"] for chunk in range(9)]
    assert seen == [seen[0]] * 9


@pytest.mark.parametrize("chunks", [1, 2, 3, 9])
@pytest.mark.parametrize("name", STACKS)
def test_a_short_first_chunk_makes_it_no_larger(name, chunks):
    """Nor does it matter when memory is first asked for: a resumed session knows how the video began."""
    stack = registry().stack(name, {})
    geometry = replace(TINY, frames=1 + (chunks - 1) * stack.chunk_frames)
    session = Session(stack, geometry)
    session.expect(1)
    own, most = TINY.tokens_per_frame, 0
    for chunk in range(chunks):
        session = session.snapshot() if chunk == 1 else session
        run_session(session, 1, seed=chunk)
        most = max(most, session.stats()["attended_tokens"] + own)
        own = stack.chunk_frames * TINY.tokens_per_frame
    made = arena_room(stack, geometry, 1)[1]
    assert made in (most, 0)  # none where rows attend unequal blocks
    assert not made or room(session) == most
    held = most_resident(geometry, stack, chunks, 1, first_frames=1)
    assert held.bytes(TINY.layers) >= session.stats()["resident_bytes"]


@pytest.mark.parametrize("name", ENDLESS)
def test_an_arena_is_made_once_for_a_video_without_end(name):
    session = Session(registry().stack(name, {}), TINY)
    seen, most = run(session, 30)
    assert seen == [seen[0]] * 30
    assert room(session) == most


def test_an_arena_whose_end_nobody_knows_grows_as_it_must():
    """Neither for what attends all of a video without end, nor for a longer one than is looked ahead."""
    full = registry().stack("full", {})
    for geometry in (TINY, replace(TINY, frames=4 * FAR + 1)):
        session = Session(full, geometry)
        sizes = [seen[0][1] for seen in run(session, 4)[0]]
        assert sizes == [4 * each * TINY.tokens_per_frame for each in (1, 2, 3, 4)]
    assert arena_room(full, replace(TINY, frames=4 * FAR), 4)[1] == 4 * FAR * TINY.tokens_per_frame


def test_a_longer_video_than_was_said_goes_on():
    stack = registry().stack("packforcing", {"topk": 2})
    session, plain = (Session(stack, replace(TINY, frames=frames)) for frames in (8, None))
    outputs = [run_session(each, 9) for each in (session, plain)]
    assert all(map(lambda a, b: a.equal(b), *outputs))
    assert room(session) == room(plain)


def test_rows_that_attend_unequal_blocks_have_no_arena_made_for_them():
    stack = registry().stack("packforcing", {"topk": 2, "sink_frames": 6})
    assert arena_room(stack, TINY, 4) == (0, 0)


@dataclass(frozen=True)
class Late(RecencySelector):
    """Fails once there are three blocks."""

    def limit(self, candidates):
        if candidates > 2:
            raise ValueError("late")
        return super().limit(candidates)


def test_what_a_policy_does_wrong_later_is_told_when_it_does():
    session = Session(replace(registry().stack("packforcing", {}), selector=Late(topk=2)), TINY)
    run_session(session, 6)
    with pytest.raises(ValueError, match="late"):
        run_session(session, 1)
    assert session.frames == 24


def test_every_part_of_a_divided_memory_is_made_once():
    session = Session(registry().stack("mixed-windows", {}), TINY)
    seen = []
    for chunk in range(20):
        run_session(session, 1, seed=chunk)
        seen.append([leaf.arena.values.data_ptr() for cache in session.caches for leaf in cache.leaves])
    assert seen == [seen[0]] * 20
