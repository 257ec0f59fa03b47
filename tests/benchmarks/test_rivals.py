"""The rivals handle the same tokens as kvpack, and what is counted of both sides is counted alike."""

import pytest
import torch

from benchmarks import cached, flashdreams, report, rival_memories, rivals

SHAPE = flashdreams.geometry(True, torch.float32)


def filled(rival, dtype=torch.float32, more=2):
    shape = flashdreams.geometry(True, dtype)
    make, full = rivals.RIVALS[rival]
    mine, theirs = rivals.mine(rival, shape), make(shape)
    frames = mine.session.stack.chunk_frames
    for chunk in range(full + more):
        projected = rivals.projections(shape, frames, chunk)
        for side in (mine, theirs):
            if chunk < full:
                side.fill(projected)
            else:
                if side is theirs:
                    side.prepare()
                side.chunk(projected)
    return mine, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rival", ["shift", "concatenate"])
@torch.no_grad()
def test_both_sides_attend_the_same(rival, dtype):
    mine, theirs = filled(rival, dtype)
    rivals.check_same({"kvpack": mine, "rival": theirs}, flashdreams.geometry(True, dtype), rival)
    theirs.attended[1][0, 0] += 1
    with pytest.raises(RuntimeError, match="attended different keys"):
        rivals.check_same({"kvpack": mine, "rival": theirs}, flashdreams.geometry(True, dtype), rival)


@torch.no_grad()
def test_reconstruction_attends_everything_that_is_held():
    mine, theirs = filled("reconstruct", more=1)
    chunk, small = 4 * SHAPE.tokens_per_frame, theirs.compressor.span(0, 4, SHAPE.grid).tokens
    assert theirs.attended[0].shape[1] == 4 * chunk + rival_memories.ARCHIVED * small
    assert mine.attended[0].shape[1] == 4 * chunk + rival_memories.MID * small
    assert mine.session.stats()["archive_blocks"] == len(theirs.mid) == rival_memories.ARCHIVED


@torch.no_grad()
def test_filling_leaves_what_whole_chunks_leave():
    """The measured chunks come behind the same past that the rival would have had."""
    for make in (rival_memories.Shift, rival_memories.Concatenate):
        one, other = make(SHAPE), make(SHAPE)
        for chunk in range(9):
            projected = rivals.projections(SHAPE, 3, chunk)
            one.fill(projected)
            other.prepare()
            other.chunk(projected)
        for side in (one, other):
            side.prepare()
            side.chunk(rivals.projections(SHAPE, 3, 9))
        assert all(torch.equal(a, b) for a, b in zip(one.attended, other.attended, strict=True))


def test_the_most_that_is_alive_at_once_is_counted():
    with rivals.Extra() as extra:
        a = torch.ones(100)
        b = a + 1
        del a
        b.view(10, 10).add_(1)
        c = torch.empty(50)
    assert extra.peak == 800
    assert extra.now == 600
    del b, c
    assert extra.now == 0


def test_a_rotation_is_counted_once_as_a_kernel():
    vectors, turns = torch.randn(1, 4, 2, 12).bfloat16(), torch.polar(torch.ones(1, 4, 1, 6), torch.ones(1, 4, 1, 6))
    with rivals.AsKernels() as kernels:
        out = kernels.rotated(vectors, turns)
        out.add(1)
    assert kernels.nbytes == 2 * vectors.nbytes + turns.nbytes + 2 * vectors.nbytes


def aligned(mebibytes):
    """Ones that begin with a line."""
    whole = torch.ones(mebibytes * 2**18 + cached.LINE)
    return whole[-(whole.data_ptr() // 4) % (cached.LINE // 4) :][: mebibytes * 2**18]


def test_what_stays_in_the_cache_is_not_moved():
    a, b = aligned(1), aligned(1)
    with cached.Cached(4 * 2**20) as small:
        b.copy_(a)
        b.mul_(a)
    assert small.nbytes == 2 * 2**20  # a came once, b went back once
    with cached.Cached(2**20) as smaller:
        b.copy_(a)
        b.mul_(a)
    assert smaller.nbytes == 5 * 2**20  # a, b back, both again, b back again


def test_lines_that_are_written_go_back_when_others_come():
    a, b, wide = aligned(4), aligned(4), aligned(8)
    with cached.Cached(2**20) as cache:
        for start in range(0, a.numel(), 2**14):
            some = slice(start, start + 2**14)
            wide[: 2**14].copy_(a[some])  # a buffer that is used again stays in the cache
            b[some].copy_(wide[: 2**14])
    assert cache.nbytes == 8 * 2**20 + 2**16
    with cached.Cached(2**20) as cache:
        wide[: 2**20].copy_(a)
        b.copy_(wide[: 2**20])
    assert cache.nbytes == 16 * 2**20


def test_the_lines_of_what_lies_apart_are_its_own():
    whole = aligned(4).view(4, 2, -1)  # half a MiB each
    per = 2**19 // cached.LINE
    first = whole.data_ptr() // cached.LINE
    assert cached.lines(whole[:, 1]) == [first + per * (2 * n + 1) + k for n in range(4) for k in range(per)]
    assert cached.lines(whole[0, :, ::2]) == list(range(first, first + 2 * per))
    assert cached.lines(whole[0, 0, :1].expand(1000)) == [first]
    assert cached.lines(whole[:0]) == []


@pytest.mark.slow
def test_all_of_it_in_small(tmp_path):
    rows = rivals.run(small=True)
    assert report.read(report.write("rivals", rows, tmp_path)) == rows
    assert len({(row.subject, row.metric) for row in rows}) == len(rows)
    assert all("NOT MEASURED" not in bar.verdict(rows) for bar in rivals.BARS)
