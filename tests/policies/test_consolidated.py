"""Memories that merge or search their past: which frames are attended, where, and which are merged."""

from itertools import pairwise

import pytest
import torch

from helpers import context, seeded
from kvpack.errors import InvalidOptionError
from kvpack.memory.session import Session
from kvpack.policies import FadeMem, LongLiveRAG
from kvpack.policies.fademem import Slot, _merged
from kvpack.policies.longlive_rag import alike
from kvpack.testing import TINY, check_memory

EACH = TINY.tokens_per_frame


def run(session, chunks, looks=lambda frame: (0.0, 0.0)):
    """Commit chunks whose keys and values hold the number of their frame, and whose latents hold `looks` of it."""
    for _ in range(chunks):
        first, frames = session.frames, session.coming_frames
        numbers = torch.arange(first, first + frames).repeat_interleave(EACH).float()
        given = numbers[None, :, None, None].expand(1, -1, TINY.heads, TINY.head_dim)
        latents = torch.zeros(1, 2, frames, 8, 10)
        for index in range(frames):
            latents[0, :, index] = torch.tensor(looks(first + index))[:, None, None]
        for layers in (session.denoise(0), session.commit((), latents)):
            for layer in layers:
                layer.attend(given, given, given, lambda q, k, v: q)
        session.finish_commit()


def attended(session):
    """Values that the next chunk attends, one for each frame, their positions, and that of the chunk."""
    (layer, *_) = session.denoise(0)
    shape = 1, session.coming_frames * EACH, TINY.heads, TINY.head_dim
    layer.attend(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape), lambda q, k, v: q)
    tokens, start = session.caches[0].attended.tokens, float(session.caches[0].attended.chunk_start)
    assert context(session).chunk_start == start
    values = [float(each) for part in tokens for each in part.values[0, ::EACH, 0, 0]]
    return values, [float(each) for part in tokens for each in part.coordinates[0, ::EACH, 0]], start


@pytest.mark.parametrize("memory", [FadeMem(), FadeMem(4, 5, 1.0, 20), FadeMem(1, 20, 0.1, 21)])
def test_fademem_keeps_the_contract(memory):
    check_memory(memory, memory.slots)


def test_fademem_merges_the_neighbours_that_are_closest_in_age():
    session = Session(FadeMem(chunk_frames=1, slots=4, decay=1.0, train_frames=9), TINY)
    run(session, 4)
    assert attended(session) == ([0, 1, 2, 3], [0, 1, 2, 3], 4)
    run(session, 1)  # all gaps are 1: the first frame takes over the span of its neighbour, and stays what it is
    assert attended(session) == ([0, 2, 3, 4], [0, 2, 3, 4], 5)
    run(session, 1)  # 2 and 3 are closest, for the newest is not merged
    assert attended(session) == ([0, 2.5, 4, 5], [0, 2, 4, 5], 6)


def test_fademem_is_dense_nearby_at_any_length():
    memory = FadeMem()
    session = Session(memory, TINY)
    run(session, 60)
    centers, spans = zip(*((slot.center, slot.span) for slot in session.past.states[0]), strict=True)
    assert sum(spans) == 180  # every frame is in one of the slots
    gaps = [180 - center for center in centers]
    ratios = [older / newer for older, newer in pairwise(gaps[:-1])]
    assert centers[0] == 0
    assert centers[-2:] == (178, 179)
    assert max(ratios) < 2.5  # ages grow by about the same factor
    values, places, start = attended(session)
    assert (values[0], places[0], places[-3:], start) == (0, 0, [15, 16, 17], 18)
    assert places == sorted(set(places))


def test_fademem_weighs_a_slot_by_the_root_of_its_span():
    older, newer = (torch.full((1, EACH, 2, 12), number, dtype=torch.bfloat16) for number in (0.0, 3.0))
    merged = _merged(Slot(10, 4, older, older), Slot(13, 1, newer, newer))
    assert (merged.center, merged.span) == (11, 5)
    assert merged.keys.dtype == torch.bfloat16
    assert merged.values.unique().tolist() == [1.0]


def test_rag_retrieves_what_looks_like_the_last_frame():
    memory = LongLiveRAG(
        chunk_frames=2, window_frames=7, sink_frames=1, retrieved_frames=2, guard_frames=1, archive_frames=6
    )
    session = Session(memory, TINY)

    def looks(frame):  # every third frame looks alike
        return (1.0, 0.0) if frame % 3 == 0 else (0.0, 1.0 + frame)

    run(session, 2, looks)
    assert attended(session) == ([0, 2, 3], [0, 2, 3], 4)
    run(session, 4, looks)  # 12 frames; the last is 11, and 1 to 4 are searched
    assert attended(session) == ([0, 2, 4, 10, 11], [0, 0, 0, 3, 4], 5)
    run(session, 2, looks)  # 16 frames, the last is 15; of 1 to 8 the oldest two are dropped
    assert attended(session) == ([0, 3, 6, 14, 15], [0, 0, 0, 3, 4], 5)


def test_rag_searches_each_row_by_itself_and_breaks_ties_to_the_newer_frame():
    looks = torch.eye(3)[[0, 1, 2, 1, 0]].expand(2, -1, -1)
    assert alike(torch.eye(3)[[0, 1]], looks, 2).tolist() == [[0, 4], [1, 3]]
    assert alike(torch.zeros(1, 3), looks[:1], 2).tolist() == [[3, 4]]


@pytest.mark.parametrize("memory", [LongLiveRAG(), LongLiveRAG(4, 16, 2, 6, 0, 5), LongLiveRAG(2, 8, 3, 1, 3, 4)])
def test_rag_keeps_the_contract(memory):
    check_memory(memory, memory.window_frames - memory.chunk_frames)


def test_rag_in_a_batch_is_that_of_its_rows():
    generator = seeded()
    latents = torch.randn(9, 2, 3, 3, 8, 10, generator=generator)
    given = torch.randn(9, 2, 3 * EACH, TINY.heads, TINY.head_dim, generator=generator)
    found = []
    for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
        session = Session(LongLiveRAG(), TINY)
        for some, each in zip(latents[:, rows], given[:, rows], strict=True):
            for layers in (session.denoise(0), session.commit((), some)):
                for layer in layers:
                    layer.attend(each, each, each, lambda q, k, v: q)
            session.finish_commit()
        session.denoise(0)[0].attend(each, each, each, lambda q, k, v: q)
        found.append(torch.cat([part.values for part in session.caches[0].attended.tokens], dim=1))
    assert torch.equal(found[0], torch.cat(found[1:]))
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FadeMem(slots=19), "slots and the chunk must fit into train_frames, 21, got 19 slots"),
        (lambda: FadeMem(decay=0.0), "decay must be a power > 0 and <= 1, got 0.0"),
        (lambda: FadeMem(slots=1), "slots must be >= 2, got 1"),
        (lambda: LongLiveRAG(window_frames=9), r"window_frames must be at least .* 1 \+ 6 \+ 3, got 9"),
        (lambda: LongLiveRAG(retrieved_frames=0), "retrieved_frames must be >= 1, got 0"),
    ],
)
def test_options_that_cannot_work(make, message):
    with pytest.raises(InvalidOptionError, match=message):
        make()
