"""Every stack for a thousand chunks: memory as promised, and keys as exactly in place at the end as at the start."""

import pytest
import torch
from helpers import ledger, whole

from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
from kvpack.plugins.registry import registry
from kvpack.testing import run_session

pytestmark = pytest.mark.slow
SMALL = Geometry(layers=1, heads=2, head_dim=12, grid=(2, 3), rope_split=(4, 4, 4))


def rotated(keys, coordinates):
    """Keys after RoPE, all in float64."""
    angles = [
        coordinates[..., axis : axis + 1].double() * 10000.0 ** -(torch.arange(0, size, 2).double() / size)
        for axis, size in enumerate(SMALL.rope_split)
    ]
    turns = torch.polar(torch.ones(1).double(), torch.cat(angles, dim=-1))
    turns = turns[:, :, None] if turns.ndim == 3 else turns
    pairs = torch.view_as_complex(keys.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


def attended(session):
    """Of every run of whole tokens that the coming chunk attends: where it begins, its stored keys and its places."""
    session.denoise(0)
    (layer,) = session.layers
    tokens = session.stack.chunk_frames * SMALL.tokens_per_frame
    q, k, v = torch.randn(3, 1, tokens, SMALL.heads, SMALL.head_dim, generator=torch.Generator().manual_seed(9))
    layer.attend(q, k, v, lambda q, k, v: q)
    (cache,) = session.caches
    if not isinstance(session.stack, Stack):
        start = 0
        for part in cache.attended.tokens:
            yield start, part.keys, part.coordinates
            start += len(part)
        return
    rotated_already = session.stack.keeps_rotated
    placement = session.plan.place(None, torch.device("cpu")).placement
    starts, lengths, blocks = placement.starts[0], placement.lengths[0], whole(session)
    pieces = ledger(session).whole
    start, behind = 0, cache.lengths[0]
    sinks = sum(piece.part == "sink" for piece in pieces)
    for block, (piece, each) in enumerate(zip(pieces, blocks, strict=True)):
        column = block if block < sinks else block - len(pieces)
        if block == sinks:
            start = behind - sum(map(len, blocks[sinks:]))
        places = grid_coordinates(piece.frames, SMALL.grid).double().clone()
        places[:, 0] = starts[column] + (places[:, 0] + 0.5) * lengths[column] / piece.frames - 0.5
        yield start, each.keys, places[None] * (not rotated_already)  # rotated by nothing again
        start += len(each)


@pytest.mark.parametrize("name", sorted(registry().stacks))
def test_a_thousand_chunks(name):
    stack = registry().stack(name, {})
    session = Session(stack, SMALL)
    run_session(session, 500, steps=1)
    before = session.stats()
    run_session(session, 500, seed=1, steps=1)
    after = session.stats()
    assert after["chunks"] == 1000
    assert after["frames"] >= 3000  # the tables of others end at 1,024
    constant = name not in ("full", "packforcing-paper")  # the paper keeps all compressed blocks
    assert (after["resident_bytes"] == before["resident_bytes"]) == constant
    assert (after["attended_tokens"] == before["attended_tokens"]) == (name != "full")
    parts = list(attended(session))
    given, _ = session.attended(0)
    assert sum(keys.shape[1] for _, keys, _ in parts) > 0
    for start, keys, places in parts:
        wanted = rotated(keys, places)
        off = float((given[:, start : start + keys.shape[1]] - wanted).norm() / wanted.norm())
        assert off < 1e-6, (start, off)
