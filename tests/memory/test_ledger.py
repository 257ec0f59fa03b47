"""Partitions are exact to the frame, whatever the sizes."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpack.errors import InvalidOptionError, PolicyError
from kvpack.memory.ledger import Ledger
from kvpack.memory.roles import Partitioner, Segment
from kvpack.policies import FullPartitioner, SinkMidRecentPartitioner, WindowPartitioner


def frames(pieces):
    return [frame for piece in pieces for frame in range(piece.first_frame, piece.stop)]


def grow(ledger, chunks):
    for _ in range(chunks):
        ledger = ledger.commit().ledger
        yield ledger


@settings(max_examples=150, deadline=None)
@given(sink=st.integers(0, 11), recent=st.integers(0, 11), chunk=st.integers(1, 5), chunks=st.integers(1, 14))
def test_every_frame_is_in_exactly_one_part(sink, recent, chunk, chunks):
    for ledger in grow(Ledger(SinkMidRecentPartitioner(sink, recent), chunk), chunks):
        n = ledger.frames
        expected_whole = [f for f in range(n) if f < sink or f >= n - recent]
        assert frames(ledger.whole) == expected_whole
        assert frames(ledger.archive) == [f for f in range(n) if f not in expected_whole]
        assert all((piece.part == "sink") == (piece.first_frame < sink) for piece in ledger.whole)


@settings(max_examples=150, deadline=None)
@given(window=st.integers(1, 16), sink=st.integers(0, 6), chunk=st.integers(1, 5), chunks=st.integers(1, 12))
def test_window_sees_what_self_forcing_sees(window, sink, chunk, chunks):
    for ledger in grow(Ledger(WindowPartitioner(window, sink), chunk), chunks):
        end = ledger.frames + chunk
        assert frames(ledger.whole) == [f for f in range(ledger.frames) if f < sink or f >= end - (window - sink)]
        assert ledger.archive == ()


def test_full_keeps_everything_in_order():
    *_, ledger = grow(Ledger(FullPartitioner(), 3), 50)
    assert frames(ledger.whole) == list(range(150))


def test_a_chunk_is_cut_only_where_parts_change():
    ledger = Ledger(SinkMidRecentPartitioner(8, 4), 4)
    assert [p.frames for p in ledger.new_pieces()] == [4]
    *_, later = grow(Ledger(SinkMidRecentPartitioner(7, 4), 3), 2)
    assert [(p.first_frame, p.frames) for p in later.new_pieces()] == [(6, 1), (7, 1), (8, 1)]


def test_archive_blocks_bounds_the_archive_oldest_out():
    *_, ledger = grow(Ledger(SinkMidRecentPartitioner(8, 4), 4, archive_blocks=3), 20)
    assert [p.first_frame for p in ledger.archive] == [64, 68, 72]
    assert max(piece.slot for piece in ledger.archive) <= 2


@settings(max_examples=60, deadline=None)
@given(blocks=st.integers(1, 12), chunk=st.integers(1, 5), chunks=st.integers(20, 60))
def test_a_spread_archive_is_full_and_reaches_back_to_the_beginning(blocks, chunk, chunks):
    """The newest block is always there, and of three or more the first."""
    *_, ledger = grow(Ledger(SinkMidRecentPartitioner(4, 4), chunk, blocks, "spread"), chunks)
    firsts = [piece.first_frame for piece in ledger.archive]
    newest = [
        piece.first_frame for piece in list(grow(Ledger(SinkMidRecentPartitioner(4, 4), chunk), chunks))[-1].archive
    ]
    assert len(firsts) == min(blocks, len(newest))
    assert firsts == sorted(set(firsts))
    assert firsts[-1] == newest[-1]
    if blocks > 2:
        assert firsts[0] == newest[0]


@pytest.mark.parametrize("eviction", ["oldest", "spread"])
def test_a_new_block_never_takes_a_slot_of_what_is_kept(eviction):
    ledger = Ledger(SinkMidRecentPartitioner(4, 4), 4, archive_blocks=2, eviction=eviction)
    for _ in range(30):
        step = ledger.commit()
        kept = {piece.slot for piece in ledger.archive if piece in step.ledger.archive}
        assert {slot for _, slot in step.leaving}.isdisjoint(kept)
        ledger = step.ledger
        assert len({piece.slot for piece in ledger.archive}) == len(ledger.archive)
        assert all(0 <= piece.slot < 2 for piece in ledger.archive)  # that of a block that goes is taken at once


def test_what_leaves_mid_leaves_the_archive():
    @dataclass(frozen=True)
    class Bounded(Partitioner):
        name = "bounded"
        horizon_frames = 12

        def partition(self, history_frames, chunk_frames):
            mid, recent = (max(0, history_frames - back) for back in (12, 4))
            return Segment("mid", range(mid, recent)), Segment("recent", range(recent, history_frames))

    for ledger in grow(Ledger(Bounded(), 4), 8):
        assert frames(ledger.archive) == list(range(max(0, ledger.frames - 12), ledger.frames - 4))


def test_twins_are_due_only_for_what_will_be_compressed():
    ledger = Ledger(SinkMidRecentPartitioner(6, 4), 4)
    due = []
    for _ in range(4):
        due += ledger.compressed_pieces()
        ledger = ledger.commit().ledger
    assert frames(due) == list(range(6, 16))


@dataclass(frozen=True)
class Scripted(Partitioner):
    segments: tuple = ()
    name = "scripted"
    horizon_frames = 4

    def partition(self, history_frames, chunk_frames):
        return self.segments


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((Segment("recent", range(9)),), "stay in the history"),
        ((Segment("recent", range(2, 4)), Segment("mid", range(2))), "ascend"),
        ((Segment("sink", range(2)), Segment("mid", range(0)), Segment("recent", range(1, 4))), "ascend"),
        ((Segment("other", range(2)),), "sink, mid or recent"),
        ((Segment("recent", range(0, 4, 2)),), "consecutive"),
    ],
)
def test_a_wrong_partition_is_named(segments, message):
    with pytest.raises(PolicyError, match=message) as caught:
        Ledger(Scripted(segments), 4).commit()
    assert "Scripted.partition" in str(caught.value)


def test_a_frame_that_was_dropped_cannot_come_back_whole():
    @dataclass(frozen=True)
    class Regrets(Scripted):
        def partition(self, history_frames, chunk_frames):
            return () if history_frames == 4 else (Segment("sink", range(history_frames)),)

    ledger = Ledger(Regrets(), 4).commit().ledger
    with pytest.raises(PolicyError, match="wants 8 whole frames; 4 of them are still whole"):
        ledger.commit()


@settings(max_examples=100, deadline=None)
@given(
    sink=st.integers(0, 9), recent=st.integers(0, 9), chunk=st.integers(1, 5), data=st.data(), chunks=st.integers(1, 12)
)
def test_a_shorter_first_chunk_moves_all_boundaries(sink, recent, chunk, data, chunks):
    first = data.draw(st.integers(1, chunk))
    for index, ledger in enumerate(
        grow(Ledger(SinkMidRecentPartitioner(sink, recent), chunk).expecting(first), chunks)
    ):
        n = first + index * chunk
        assert (ledger.frames, ledger.chunks, ledger.coming) == (n, index + 1, chunk)
        expected_whole = [f for f in range(n) if f < sink or f >= n - recent]
        assert frames(ledger.whole) == expected_whole
        assert frames(ledger.archive) == [f for f in range(n) if f not in expected_whole]


def test_a_chunk_is_not_longer_than_the_stack_says():
    with pytest.raises(InvalidOptionError, match="1 to 4 latent frames with this stack, got 5"):
        Ledger(FullPartitioner(), 4).expecting(5)
