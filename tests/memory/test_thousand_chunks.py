"""Every stack for a thousand chunks: memory as promised, and keys as exactly in place at the end as at the start."""

from dataclasses import replace

import pytest
import torch

from helpers import context, ledger, placement, record_forwards, seeded
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.divided import Divided
from kvpack.memory.geometry import Geometry
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
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


def attended(session, clean):
    """Of every run of whole tokens that the coming chunk attends: where it begins, its keys and its places.

    Args:
        clean: keys of each frame before RoPE, as they were committed.
    """
    (layer,) = session.denoise(0)
    tokens = session.stack.chunk_frames * session.geometry.tokens_per_frame
    layer.attend(
        *torch.randn(3, 1, tokens, session.geometry.heads, session.geometry.head_dim, generator=seeded(9)),
        lambda q, k, v: q,
    )
    if isinstance(session.stack, Divided):  # the one layer has one window, at its places in the video
        start = 0
        for piece in session.past.book.books[0].ledger.whole:
            places = grid_coordinates(piece.frames, session.geometry.grid).double().clone()
            places[:, 0] += piece.first_frame
            yield (
                start,
                torch.cat([clean[frame] for frame in range(piece.first_frame, piece.stop)], dim=1),
                places[None],
            )
            start += len(places)
        return
    if not isinstance(session.stack, Stack):
        start = 0
        for part in context(session).tokens:
            yield start, part.keys, part.coordinates
            start += len(part)
        return
    starts, lengths = placement(session).starts[0], placement(session).lengths[0]
    pieces, (keys, _) = ledger(session).whole, session.attended(0)
    sinks = sum(piece.part == "sink" for piece in pieces)
    start = 0
    for index, piece in enumerate(pieces):
        block = index if index < sinks else index - len(pieces)
        if index == sinks:
            start = keys.shape[1] - sum(each.frames for each in pieces[sinks:]) * session.geometry.tokens_per_frame
        places = grid_coordinates(piece.frames, session.geometry.grid).double().clone()
        places[:, 0] = starts[block] + (places[:, 0] + 0.5) * lengths[block] / piece.frames - 0.5
        yield start, torch.cat([clean[frame] for frame in range(piece.first_frame, piece.stop)], dim=1), places[None]
        start += len(places)


@pytest.mark.parametrize("name", sorted(registry().stacks))
def test_a_thousand_chunks(name, monkeypatch):
    forwards = record_forwards(monkeypatch)
    stack = registry().stack(name, GROWING.get(name, {}))
    # What is attended of all of the past is copied in each chunk.
    shape = replace(SMALL, heads=1, grid=(1, 2)) if name == "full" else SMALL
    chunks = 400 if name == "full" else 1000
    session = Session(stack, shape)
    run_session(session, chunks // 2, steps=1)
    before = session.stats()
    run_session(session, chunks // 2, seed=1, steps=1)
    after = session.stats()
    assert after["chunks"] == chunks
    assert after["frames"] >= 3 * chunks > 1024  # where the tables of others end
    constant = name not in GROWING or bool(GROWING[name])
    assert (after["resident_bytes"] == before["resident_bytes"]) == constant
    assert (after["attended_tokens"] == before["attended_tokens"]) == (name != "full")
    # The last forward of a whole chunk is its commit; those of a compressor's tokens are shorter.
    whole = stack.chunk_frames * shape.tokens_per_frame
    chunks = {first: keys for first, keys, _ in forwards(session) if keys.shape[1] == whole}
    frames = [keys.split(shape.tokens_per_frame, dim=1) for keys in chunks.values()]
    clean = {first + index: each for first, part in zip(chunks, frames, strict=True) for index, each in enumerate(part)}
    parts = list(attended(session, clean))
    given, _ = session.attended(0)
    assert sum(keys.shape[1] for _, keys, _ in parts) > 0
    for start, keys, places in parts:
        wanted = rotated(keys, places)
        off = float((given[:, start : start + keys.shape[1]] - wanted).norm() / wanted.norm())
        assert off < 1e-6, (start, off)
