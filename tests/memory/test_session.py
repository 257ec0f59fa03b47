"""The memory itself, against a plain reference that keeps everything and looks at every frame."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool3d
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import archived, attention, held, placement, places, pool_stack, spoil
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.memory.rope import rotate, rotations
from kvpack.memory.session import Session
from kvpack.policies import (
    AbsoluteReindexer,
    AllSelector,
    ContiguousReindexer,
    FitReindexer,
    IdentityCompressor,
    LowResolutionCompressor,
    PoolCompressor,
    QueryTopK,
    SinkMidRecentPartitioner,
    SinkShiftReindexer,
    WindowPartitioner,
)
from kvpack.testing import TINY, run_session

GRID = TINY.grid


make = pool_stack


class Reference:
    """Keeps all keys and values by frame; of the last layer, one batch row, no buffers."""

    def __init__(self, stack, batch):
        self.stack, self.batch = stack, batch
        self.chunks = []  # (keys, values) before RoPE, (b, f*n, h, d)

    def frame(self, index):
        chunk, offset = divmod(index, self.stack.chunk_frames)
        n = TINY.tokens_per_frame
        return [t[:, offset * n : (offset + 1) * n] for t in self.chunks[chunk]]

    def groups(self, kind):
        """Runs of mid frames that left together and came with one chunk, in order."""
        sink, recent, b = (
            self.stack.partitioner.sink_frames,
            self.stack.partitioner.recent_frames,
            self.stack.chunk_frames,
        )
        n = len(self.chunks) * b
        key = {f: (f // b, max(0, -(-(f + 1 + recent) // b))) for f in range(sink, max(sink, n - recent))}
        groups = []
        for f in sorted(key):
            if groups and key[groups[-1][-1]] == key[f]:
                groups[-1].append(f)
            else:
                groups.append([f])
        return groups

    def pooled(self, group):
        sizes = (max(1, len(group) // 2), max(1, GRID[0] // 4), max(1, GRID[1] // 4))
        out = []
        for kind in (0, 1):
            frames = torch.stack([self.frame(f)[kind] for f in group], dim=1)  # (b, f, n, h, d)
            cells = frames.flatten(3).unflatten(2, GRID).movedim(-1, 1)
            out.append(adaptive_avg_pool3d(cells, sizes).flatten(2).transpose(1, 2).unflatten(2, (TINY.heads, -1)))
        return (*out, grid_coordinates(len(group), GRID, sizes))

    def expected(self, q, k, v, row):
        sink, recent = self.stack.partitioner.sink_frames, self.stack.partitioner.recent_frames
        n = len(self.chunks) * self.stack.chunk_frames
        groups = self.groups(0)
        scores = []
        for group in groups:
            keys = self.pooled(group)[0][row]  # (n, h, d)
            scores.append(float(torch.einsum("ihd,jhd->", q[row], keys)) / keys.shape[0])
        best = sorted(range(len(groups)), key=lambda m: (-scores[m], -m))[: self.stack.selector.topk]
        position, keys, values = 0.0, [], []

        def add(kk, vv, coordinates, frames):
            nonlocal position
            at = coordinates + torch.tensor([position, 0, 0])
            keys.append(rotate(kk[row : row + 1], rotations(at[None], TINY)))
            values.append(vv[row : row + 1])
            position += frames

        one = grid_coordinates(1, GRID)
        for f in range(min(sink, n)):
            add(*self.frame(f), one, 1)
        for m in sorted(best):
            kk, vv, coordinates = self.pooled(groups[m])
            add(kk, vv, coordinates, len(groups[m]))
        for f in range(max(sink, n - recent), n):
            add(*self.frame(f), one, 1)
        at = grid_coordinates(self.stack.chunk_frames, GRID) + torch.tensor([position, 0, 0])
        turns = rotations(at[None], TINY)
        keys.append(rotate(k[row : row + 1], turns))
        values.append(v[row : row + 1])
        return attention(rotate(q[row : row + 1], turns), torch.cat(keys, dim=1), torch.cat(values, dim=1))


@pytest.mark.parametrize(
    ("sink", "recent", "chunk"), [(8, 4, 4), (6, 3, 3), (7, 5, 3), (0, 4, 4), (5, 0, 2), (2, 7, 4)]
)
def test_packforcing_equals_the_reference(sink, recent, chunk):
    stack = make(SinkMidRecentPartitioner(sink, recent), chunk_frames=chunk)
    session, batch, generator = Session(stack, TINY), 2, torch.Generator().manual_seed(3)
    reference = Reference(stack, batch)
    tokens = chunk * TINY.tokens_per_frame
    for _ in range(10):
        q, k, v = torch.randn(3, batch, tokens, TINY.heads, TINY.head_dim, generator=generator)
        session.denoise(0)
        for layer in session.layers:
            out = layer.attend(q, k, v, attention)
        for row in range(batch):
            torch.testing.assert_close(out[row : row + 1], reference.expected(q, k, v, row), rtol=1e-4, atol=1e-5)
        session.commit()
        q, k, v = torch.randn(3, batch, tokens, TINY.heads, TINY.head_dim, generator=generator)
        for layer in session.layers:
            layer.attend(q, k, v, attention)
        session.finish_commit()
        reference.chunks.append((k, v))


def test_denoising_never_writes_history():
    session = Session(make(), TINY)
    run_session(session, 6)
    before, archives, blocks = session.past, [archived(session, layer) for layer in range(2)], held(session)
    tokens = 4 * TINY.tokens_per_frame
    for step in range(3):
        session.denoise(step)
        for layer in session.layers:
            layer.attend(*torch.randn(3, 1, tokens, TINY.heads, TINY.head_dim), attention)
    assert session.past is before
    for given, wanted in zip([archived(session, layer) for layer in range(2)], archives, strict=True):
        assert all(torch.equal(*pair) for pair in zip(sum(given, ()), sum(wanted, ()), strict=True))
    for (_, given), (_, wanted) in zip(held(session), blocks, strict=True):
        assert all(torch.equal(*pair) for pair in zip(sum(given, ()), sum(wanted, ()), strict=True))


@pytest.mark.parametrize("archive_blocks", [None, 3])
@pytest.mark.parametrize("done", [0, 1])
def test_a_failed_commit_leaves_everything_as_it_was(done, archive_blocks):
    """It fails in the first layer or in the second; a full archive has no slot to spare."""

    class Breaks(PoolCompressor):
        left = None

        def compress(self, block, grid):
            if Breaks.left == 0:
                raise KeyboardInterrupt
            Breaks.left = None if Breaks.left is None else Breaks.left - 1
            return super().compress(block, grid)

    stack = make(compressor=Breaks(), archive_blocks=archive_blocks)
    session = Session(stack, TINY)
    run_session(session, 9)
    twin, before, archives = session.snapshot(), session.past, [archived(session, layer) for layer in range(2)]
    Breaks.left = done
    with pytest.raises(KeyboardInterrupt):
        run_session(session, 1, seed=5)
    Breaks.left = None
    assert session.past is before
    for given, wanted in zip([archived(session, layer) for layer in range(2)], archives, strict=True):
        assert all(torch.equal(*pair) for pair in zip(sum(given, ()), sum(wanted, ()), strict=True))
    again, other = run_session(session, 3, seed=9), run_session(twin, 3, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(again, other, strict=True))


def test_a_commit_without_its_forward_is_refused():
    session = Session(make(), TINY)
    session.commit()
    with pytest.raises(RuntimeError, match="must follow commit"):
        session.finish_commit()
    assert session.frames == 0


def test_a_snapshot_goes_on_with_the_same_bits():
    whole = Session(make(archive_blocks=4), TINY)
    run_session(whole, 9)
    resumed = whole.snapshot()
    a, b = run_session(whole, 6, seed=7), run_session(resumed, 6, seed=7)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert whole.frames == resumed.frames == 60


@pytest.mark.parametrize(
    "reindexer", [ContiguousReindexer(), AbsoluteReindexer(), FitReindexer(30), SinkShiftReindexer()]
)
@pytest.mark.parametrize("compressor", [PoolCompressor(), IdentityCompressor(), LowResolutionCompressor()])
@pytest.mark.parametrize("sizes", [(8, 4, 4), (7, 5, 3)])
def test_batch_rows_do_not_influence_each_other(reindexer, compressor, sizes):
    stack = make(
        SinkMidRecentPartitioner(*sizes[:2]), compressor=compressor, reindexer=reindexer, chunk_frames=sizes[2]
    )
    whole = run_session(Session(stack, TINY), 9, batch=3)
    for row in range(3):
        alone = run_session(Session(stack, TINY), 9, batch=3, rows=slice(row, row + 1))
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(a[row : row + 1], b, rtol=1e-5, atol=1e-5)


class NoSync(TorchDispatchMode):
    """Fails on any operation that would wait for the device or read it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reindexer", [ContiguousReindexer(), AbsoluteReindexer(), FitReindexer(30)])
def test_no_forward_waits_for_the_device(reindexer):
    session = Session(make(reindexer=reindexer), TINY)
    run_session(session, 8)
    qkv = torch.randn(3, 2, 4 * TINY.tokens_per_frame, TINY.heads, TINY.head_dim)
    session = Session(make(reindexer=reindexer), TINY)
    run_session(session, 8, batch=2)
    for announce in (lambda: session.denoise(0), lambda: session.denoise(1), session.commit):
        announce()
        with NoSync():
            for layer in session.layers:
                layer.attend(*qkv, attention)


def test_buffers_stay_where_they_are():
    session = Session(make(archive_blocks=5), TINY)
    run_session(session, 12)

    before, resident = places(session), session.stats()["resident_bytes"]
    run_session(session, 12, seed=1)
    assert places(session) == before
    assert session.stats()["resident_bytes"] == resident


def test_attention_reads_one_contiguous_view_of_exactly_what_is_there():
    session, seen = Session(make(), TINY), []

    def spy(q, k, v):
        seen.append((k.shape[1], k[0].is_contiguous(), v[0].is_contiguous(), bool(k.isfinite().all())))
        return attention(q, k, v)

    generator = torch.Generator().manual_seed(0)
    n = TINY.tokens_per_frame
    for chunk in range(7):
        spoil(session)  # what was never written must never be attended
        for announce in (lambda: session.denoise(0), session.commit):
            announce()
            for layer in session.layers:
                layer.attend(*torch.randn(3, 1, 4 * n, TINY.heads, TINY.head_dim, generator=generator), spy)
        session.finish_commit()
        mid = min(2, max(0, chunk - 3)) * 2
        expected = min(chunk, 2) * 4 * n + mid + (4 * n if chunk > 2 else 0) + 4 * n
        assert set(seen) == {(expected, True, True, True)}
        seen.clear()


def test_stats_count_tokens_and_bytes():
    session = Session(make(), TINY)
    run_session(session, 10)
    stats, token = session.stats(), TINY.kv_bytes_per_token
    assert (stats["sink_tokens"], stats["recent_tokens"]) == (160, 80)
    assert stats["attended_tokens"] == 160 + 2 * 2 + 80
    assert stats["attended_bytes"] == stats["attended_tokens"] * token
    assert stats["archive_blocks"] == 7
    assert stats["archive_bytes"] == 7 * 2 * token
    assert stats["resident_bytes"] > stats["attended_bytes"] + stats["archive_bytes"]
    assert all(len(set(row)) == 2 for layer in stats["selected"] for row in layer)


def test_unselected_blocks_come_back():
    """Soft eviction: what was passed over once can be chosen later."""
    session, chosen = Session(make(selector=QueryTopK(1)), TINY), []
    for seed in range(40):
        run_session(session, 1, seed=seed)
        if session.stats()["selected"]:
            chosen.append(session.stats()["selected"][0][0][0])
    assert any(later < earlier for earlier, later in pairwise(chosen))


def test_positions_of_a_long_video_stay_small_or_grow_as_asked():
    for reindexer, bound in (
        (ContiguousReindexer(), 8 + 2 * 4 + 4),
        (FitReindexer(20), 20 - 4),
        (AbsoluteReindexer(), None),
    ):
        session, starts = Session(make(reindexer=reindexer), TINY), []
        run_session(session, 30, inspect=lambda each, starts=starts: starts.append(placement(each).chunk_start))
        assert float(starts[-1].max()) == (29 * 4 if bound is None else pytest.approx(bound))


def test_sink_shift_abuts_the_oldest_kept_frame():
    session = Session(make(WindowPartitioner(12, 4), selector=AllSelector(), reindexer=SinkShiftReindexer()), TINY)
    found = []
    run_session(session, 12, inspect=lambda each: found.append(placement(each)))
    assert found[-1].starts[0].tolist() == [36.0, 40.0]
    assert found[-1].chunk_start.tolist() == [44.0]


def test_bf16_and_float16_memory():
    for dtype in (torch.bfloat16, torch.float16):
        session = Session(make(), replace(TINY, dtype=dtype))
        out = run_session(session, 8)
        assert out[-1].dtype == dtype
        assert (
            session.stats()["attended_bytes"]
            == session.stats()["attended_tokens"] * session.geometry.kv_bytes_per_token
        )


@pytest.mark.slow
def test_two_thousand_chunks():
    tiny = Geometry(1, 1, 6, (1, 2), (2, 2, 2))
    session = Session(make(selector=QueryTopK(4), archive_blocks=64), tiny)
    run_session(session, 200, steps=1)
    resident = session.stats()["resident_bytes"]
    out = run_session(session, 1800, steps=1, seed=1)
    assert session.frames == 8_000
    assert session.stats()["resident_bytes"] == resident
    assert all(bool(o.isfinite().all()) for o in out[-10:])


def test_a_fork_counts_the_archive_of_all_rows():
    session = Session(pool_stack(archive_blocks=4), TINY)
    run_session(session, 8, batch=2)
    assert session.snapshot().stats()["archive_bytes"] == session.stats()["archive_bytes"] > 0
