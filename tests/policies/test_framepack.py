"""Blocks that shrink with age: sizes, means and places, against sums by hand."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from helpers import placement, room
from kvpack.errors import PolicyError
from kvpack.memory.blocks import KVBlock, Span, grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.memory.rope import rotate, rotations
from kvpack.memory.session import Session
from kvpack.planning.planner import plan
from kvpack.policies import GeometricCompressor, framepack
from kvpack.testing import check_policy, run_session

GRID = Geometry(layers=2, heads=2, head_dim=12, grid=(4, 6), rope_split=(4, 4, 4))


def block(frames, grid):
    """A block whose keys are its tokens' indices and whose values are their places."""
    places = grid_coordinates(frames, grid)
    keys = torch.arange(len(places)).float()[None, :, None, None].expand(1, -1, 1, 3).contiguous()
    return KVBlock(keys, places[None, :, None].contiguous(), Span(0, frames, places))


def means(tensor, sizes, side):
    """Means over windows of `side`, of a grid whose sizes are multiples of it."""
    grid = tensor.unflatten(0, sizes)
    return torch.stack(
        [
            grid[t : t + side, y : y + side, x : x + side].flatten(0, 2).mean(0)
            for t in range(0, sizes[0], side)
            for y in range(0, sizes[1], side)
            for x in range(0, sizes[2], side)
        ]
    )


def test_windows_double_with_age():
    policy, grid = GeometricCompressor(levels=2), (8, 8)
    given = block(8, grid)
    archived = policy.compress(given, grid)
    assert archived.keys.shape[1] == archived.span.tokens == 4 * 4 * 4
    for level, side in ((0, 2), (1, 4), (2, 8)):
        shrunk = policy.shrunk(archived, grid, level) if level else archived
        for tensor, whole in ((shrunk.keys, given.keys), (shrunk.values, given.values)):
            torch.testing.assert_close(tensor[0, :, 0], means(whole[0, :, 0], (8, *grid), side))
        torch.testing.assert_close(shrunk.values[0, :, 0], shrunk.span.coordinates)


def test_odd_sizes_keep_every_token():
    policy, grid = GeometricCompressor(), (5, 7)
    archived = policy.compress(block(3, grid), grid)
    shrunk = policy.shrunk(archived, grid, 1)
    assert (archived.span.tokens, shrunk.span.tokens) == (2 * 3 * 4, 1 * 2 * 2)
    one_hot = torch.eye(3 * 5 * 7)[None, :, None]
    seen = policy.shrunk(policy.compress(KVBlock(one_hot, one_hot, block(3, grid).span), grid), grid, 1).keys
    assert bool((seen[0, :, 0].sum(0) > 0).all())


def test_levels_double():
    assert [GeometricCompressor(levels=3).level(age) for age in range(9)] == [0, 1, 2, 2, 3, 3, 3, 3, 3]
    assert [GeometricCompressor(newest_blocks=2, levels=3).level(age) for age in range(9)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        2,
        2,
        3,
    ]


def naive(cells, sizes, side):
    """Means of a grid of cells over windows that reach as far as adaptive pooling's, in loops."""
    new = [-(-size // side) for size in sizes]
    windows = [
        [range(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
        for size, count in zip(sizes, new, strict=True)
    ]
    means = [torch.stack([cells[at] for at in product(*window)]).mean(0) for window in product(*windows)]
    return dict(zip(product(*map(range, new)), means, strict=True)), new


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
@pytest.mark.parametrize("reindexer", ["contiguous", "fit"])
def test_a_session_attends_the_means_of_what_was_committed(grid, reindexer):
    """Keys at their places, and values, of every layer: oldest blocks smallest, the newest archived one as it is."""
    geometry = replace(GRID, grid=grid)
    session, generator = Session(framepack(reindexer=reindexer), geometry), torch.Generator().manual_seed(1)
    most, rooms, frames = (
        0,
        set(),
        [[] for _ in session.caches],
    )  # each [keys or values, batch, rows, columns, heads, head_dim]
    for chunk in range(8):
        for announce in (lambda: session.denoise(0), session.commit):
            announce()
            given = [torch.randn(3, 2, 4 * grid[0] * grid[1], 2, 12, generator=generator) for _ in session.caches]
            for layer, qkv in zip(session.layers, given, strict=True):
                layer.attend(*qkv, lambda queries, keys, values: queries)
        archived = [range(max(1, 4 * c), 4 * c + 4) for c in range(chunk - 1)][-5:]
        blocks = [(range(1), 0)] + [(run, 2) for run in archived[:-1]] + [(run, 1) for run in archived[-1:]]
        blocks += [(range(max(1, 4 * chunk - 4), 4 * chunk), 0)]
        mid = sum(len(run) for run in archived)
        # 20 positions less those of the sink frame, the recent chunk and the current one.
        ratio = min(1.0, (20 - 9) / mid) if reindexer == "fit" and mid else 1.0
        for index in range(geometry.layers if chunk else 0):
            tokens, places, start = [], [], 0.0
            for run, halvings in blocks:
                squeeze, sizes = (ratio if halvings else 1.0), (len(run), *grid)
                cells = {(t, y, x): frames[index][run[t]][:, :, y, x] for t, y, x in product(*map(range, sizes))}
                at = {cell: torch.tensor(cell, dtype=torch.float64) for cell in cells}
                for _ in range(halvings):
                    (cells, smaller), (at, _) = naive(cells, sizes, 2), naive(at, sizes, 2)
                    sizes = smaller
                for cell in sorted(cells):
                    t, y, x = at[cell].tolist()
                    tokens.append(cells[cell])
                    places.append((start + (t + 0.5) * squeeze - 0.5, y, x))
                start += len(run) * squeeze
            keys, values = torch.stack(tokens, dim=2)
            turns = rotations(torch.tensor(places, dtype=torch.float64)[None], geometry)
            seen = session.attended(index)
            torch.testing.assert_close(seen[0], rotate(keys, turns), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(seen[1], values, rtol=1e-5, atol=1e-6)
            assert placement(session, index).chunk_start.tolist() == pytest.approx([start])
        most = max(most, session.stats()["attended_tokens"] + 4 * grid[0] * grid[1])
        rooms.add(room(session))
        session.finish_commit()
        for index, (_, keys, values) in enumerate(given):
            frames[index] += torch.stack([keys, values]).unflatten(2, (4, *grid)).unbind(2)
    assert rooms == {most}  # from the first chunk on


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda block: (block.keys[:, 1:], block.values), r"shrunk returned keys .* but shrunk_span\(\) announces"),
        (lambda block: (block.keys, block.values.double()), "shrunk returned values torch.float64"),
    ],
)
def test_a_shrunk_block_that_is_not_as_announced_is_refused(broken, says):
    class Breaks(GeometricCompressor):
        def shrunk(self, block, grid, level):
            return KVBlock(*broken(super().shrunk(block, grid, level)), block.span)

    session = Session(replace(framepack(), compressor=Breaks()), GRID)
    with pytest.raises(PolicyError, match=says):
        run_session(session, 6, steps=1)


def test_what_each_chunk_attends():
    """One frame of sink, long blocks of 1x1x2 tokens, a middle one of 2x2x3, the recent chunk of 4x4x6."""
    session = Session(framepack(), GRID)
    frame, recent, middle, long = 24, 96, 12, 2
    attended, found = [], []
    for _ in range(10):
        run_session(session, 1, steps=1, inspect=lambda each: found.append(placement(each)))
        attended.append(session.stats()["attended_tokens"])
    first = 3 * frame  # what is left of the first chunk beside its sink is a block of three frames: 2x2x3, then 1x1x2
    assert attended[:2] == [0, frame + first]
    assert attended[2] == frame + middle + recent
    assert attended[3] == frame + long + middle + recent
    assert attended[4] == frame + 2 * long + middle + recent
    assert attended[6:] == [frame + 4 * long + middle + recent] * 4
    assert found[-1].starts[0].tolist() == [0, 1, 5, 9, 13, 17, 21]
    assert found[-1].chunk_start.tolist() == [25]  # to 28: Helios's 0 to 28
    assert session.stats()["archive_blocks"] == 5


def test_the_plan_is_what_is_measured():
    for chunks in (1, 4, 9):
        session = Session(framepack(), GRID)
        run_session(session, chunks, steps=1)
        planned, measured = plan(GRID, framepack(), 4 * chunks), session.stats()
        assert planned.attended_tokens == measured["attended_tokens"] + planned.chunk_tokens
        assert (planned.attended_kv_bytes, planned.archive_kv_bytes) == (
            measured["attended_bytes"],
            measured["archive_bytes"],
        )


def test_the_contract():
    check_policy(GeometricCompressor())
    check_policy(GeometricCompressor(newest_blocks=2, levels=3))
