"""Every stack for a thousand chunks: memory as promised, and keys as exactly in place at the end as at the start."""

import pytest
import torch

from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.memory.session import Session
from kvpack.plugins.registry import registry
from kvpack.testing import run_session

pytestmark = pytest.mark.slow
SMALL = Geometry(layers=1, heads=2, head_dim=12, grid=(2, 3), rope_split=(4, 4, 4))
#: What promises constant memory only with an option.
GROWING = {"full": {}, "packforcing": {"archive_blocks": 32}, "packforcing-paper": {}}


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
    if not isinstance(session, Session):
        start = 0
        for part in layer.attended.tokens:
            yield start, part.keys, part.coordinates
            start += len(part)
        return
    (turns,) = layer.placed
    starts, lengths = turns.placement.starts[0], turns.placement.lengths[0]
    held = session.history.held
    start, behind = 0, layer.buffer.lengths[0]
    sinks = [each for each in held if each.piece.part == "sink"]
    for block, each in [*enumerate(sinks), *enumerate(held[len(sinks) :], len(sinks) - len(held))]:
        frames, (keys, _) = each.piece.frames, each.layers[0]
        if block == len(sinks) - len(held):
            start = behind - sum(each.layers[0][0].shape[1] for each in held[len(sinks) :])
        places = grid_coordinates(frames, SMALL.grid).double().clone()
        places[:, 0] = starts[block] + (places[:, 0] + 0.5) * lengths[block] / frames - 0.5
        yield start, keys, places[None]
        start += keys.shape[1]


@pytest.mark.parametrize("name", sorted(registry().stacks))
def test_a_thousand_chunks(name):
    stack = registry().stack(name, GROWING.get(name, {}))
    session = Session(stack, SMALL)
    run_session(session, 500, steps=1)
    before = session.stats()
    run_session(session, 500, seed=1, steps=1)
    after = session.stats()
    assert after["chunks"] == 1000
    assert after["frames"] >= 3000  # the tables of others end at 1,024
    constant = name not in GROWING or bool(GROWING[name])
    assert (after["resident_bytes"] == before["resident_bytes"]) == constant
    assert (after["attended_tokens"] == before["attended_tokens"]) == (name != "full")
    parts = list(attended(session))
    given, _ = session.attended(0)
    assert sum(keys.shape[1] for _, keys, _ in parts) > 0
    for start, keys, places in parts:
        wanted = rotated(keys, places)
        off = float((given[:, start : start + keys.shape[1]] - wanted).norm() / wanted.norm())
        assert off < 1e-6, (start, off)
