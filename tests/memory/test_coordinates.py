"""Where compressed tokens sit: their coordinates in the block, and the positions that follow from them."""

import pytest
import torch

from helpers import archived
from kvpack.errors import InvalidOptionError, UnusedOptionError
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.rope import rotate, rotations
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
from kvpack.plugins.registry import registry
from kvpack.plugins.resolve import stack_from_dict
from kvpack.policies import (
    ContiguousReindexer,
    FitReindexer,
    LowResolutionCompressor,
    PoolCompressor,
    QueryTopK,
    SinkMidRecentPartitioner,
)
from kvpack.testing import TINY, check_policy, run_session

#: Times, rows and columns of a block of 4 frames of 8 x 12 cells.
AXES = {
    "centered": ([0.5, 2.5], [1.5, 5.5], [1.5, 5.5, 9.5]),
    "strided": ([0.0, 2.0], [0.0, 4.0], [0.0, 4.0, 8.0]),
    "compact": ([0.0, 1.0], [0.0, 1.0], [0.0, 1.0, 2.0]),
}


@pytest.mark.parametrize("compressor", [PoolCompressor, LowResolutionCompressor])
@pytest.mark.parametrize("name", AXES)
def test_coordinates(compressor, name):
    span = compressor(coordinates=name).span(8, 4, (8, 12))
    assert span.coordinates.tolist() == [[t, y, x] for t in AXES[name][0] for y in AXES[name][1] for x in AXES[name][2]]
    assert (span.first_frame, span.frames, span.tokens) == (8, 4, 12)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("centered", [2.0, 6.0, 10.0, 14.5, 19.0, 23.0, 27.0]),
        ("strided", [0, 4, 8, 12, 17, 21, 25]),
        ("compact", list(range(7))),
    ],
)
def test_rows_that_do_not_divide(name, rows):
    coordinates = PoolCompressor(coordinates=name).span(0, 4, (30, 52)).coordinates
    assert coordinates[:, 1].unique().tolist() == rows


@pytest.mark.parametrize("compressor", [PoolCompressor, LowResolutionCompressor])
@pytest.mark.parametrize("name", ["strided", "compact"])
def test_the_options_keep_the_contract(compressor, name):
    check_policy(compressor(coordinates=name))


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("centered", [[0.5, 1.5, 2.0], [2.5, 1.5, 2.0]]),
        ("strided", [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]),
        ("compact", [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]),
    ],
)
@pytest.mark.parametrize(("reindexer", "squeeze"), [(ContiguousReindexer(), 1.0), (FitReindexer(16), 0.5)])
def test_positions_in_the_packed_buffer(name, places, reindexer, squeeze):
    """Sink at 0 to 3, two mid blocks from 4 on, at full length or squeezed into half."""
    stack = Stack("a", SinkMidRecentPartitioner(4, 4), PoolCompressor(coordinates=name), QueryTopK(2), reindexer)
    session = Session(stack, TINY)
    run_session(session, 4)
    session.denoise(0)
    qkv = torch.zeros(3, 1, 80, TINY.heads, TINY.head_dim)
    session.layers[0].attend(*qkv, lambda q, k, v: q)
    keys, _ = session.attended(0)
    for block, (stored, _) in enumerate(archived(session)):
        start = 4 + 4 * squeeze * block
        positions = torch.tensor([[start + (t + 0.5) * squeeze - 0.5, y, x] for t, y, x in places])
        wanted = rotate(stored, rotations(positions[None], TINY))
        torch.testing.assert_close(keys[:, 80 + 2 * block : 82 + 2 * block], wanted)


@pytest.mark.parametrize("compressor", ["pool", "lr"])
def test_packforcing_hands_them_through(compressor):
    made = registry().stack("packforcing", {"compressor": compressor, "coordinates": "strided"})
    assert made.compressor.coordinates == "strided"
    assert stack_from_dict(made.to_dict()) == made
    assert registry().stack("packforcing", {"compressor": compressor}).compressor.coordinates == "centered"
    with pytest.raises(UnusedOptionError, match="coordinates has no effect: compressor 'identity' does not take it"):
        registry().stack("packforcing", {"compressor": "identity", "coordinates": "strided"})


@pytest.mark.parametrize("compressor", [PoolCompressor, LowResolutionCompressor])
def test_a_wrong_word_is_refused(compressor):
    policy = compressor()
    vars(policy)["coordinates"] = "middle"  # past the signature, which the tests check and a user's process doesn't
    with pytest.raises(InvalidOptionError, match="coordinates must be one of centered, strided, compact, got 'middle'"):
        policy.__post_init__()


def test_who_writes_over_places_changes_those_of_nobody_else():
    grid_coordinates(2, (2, 2)).zero_()
    assert grid_coordinates(2, (2, 2))[-1].tolist() == [1, 1, 1]
