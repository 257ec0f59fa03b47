"""Blocks that shrink with age: sizes, means and places, against sums by hand."""

import torch

from kvpack.blocks import KVBlock, Span, grid_coordinates
from kvpack.geometry import Geometry
from kvpack.planner import plan
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


def test_what_each_chunk_attends():
    """One frame of sink, long blocks of 1x1x2 tokens, a middle one of 2x2x3, the recent chunk of 4x4x6."""
    session = framepack().session(GRID)
    frame, recent, middle, long = 24, 96, 12, 2
    attended = []
    for _ in range(10):
        run_session(session, 1, steps=1)
        attended.append(session.stats()["attended_tokens"])
    first = 3 * frame  # what is left of the first chunk beside its sink is a block of three frames: 2x2x3, then 1x1x2
    assert attended[:2] == [0, frame + first]
    assert attended[2] == frame + middle + recent
    assert attended[3] == frame + long + middle + recent
    assert attended[4] == frame + 2 * long + middle + recent
    assert attended[6:] == [frame + 4 * long + middle + recent] * 4
    (turns,) = session.layers[0].placed
    assert turns.placement.starts[0].tolist() == [0, 1, 5, 9, 13, 17, 21]
    assert turns.placement.chunk_start.tolist() == [25]  # to 28: Helios's 0 to 28
    assert len(session.history.ledger.archive) == 5


def test_the_plan_is_what_is_measured():
    for chunks in (1, 4, 9):
        session = framepack().session(GRID)
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
