"""The archive of a layer: a commit writes it whole or not at all, and its places are of one kind."""

from dataclasses import dataclass, replace

import pytest
import torch

from helpers import ledger
from kvpack import Session
from kvpack.errors import PolicyError
from kvpack.memory import archive as archive_module
from kvpack.memory.archive import Archive
from kvpack.memory.blocks import KVBlock, Span
from kvpack.memory.codec import room
from kvpack.planning.resident import resident
from kvpack.plugins.registry import registry
from kvpack.policies.pool import PoolCompressor
from kvpack.testing import TINY, run_session


def archives(session):
    return [state.archive for state in session.past.states]


@pytest.mark.parametrize("failing", range(TINY.layers))
@pytest.mark.parametrize("full", [False, True])
def test_memory_that_runs_out_leaves_the_archive_as_it_was(failing, full, monkeypatch):
    """While room is made, for whichever layer: no block of the past before is written over."""
    session = Session(registry().stack("packforcing", {"topk": 2, "archive_blocks": 2 if full else None}), TINY)
    run_session(session, 8)
    assert len(ledger(session).archive) == (2 if full else 5)
    before, past = [archive.keys[0][:, : archive.slots].clone() for archive in archives(session)], session.past
    reserve, calls = Archive.reserve, []

    def fails(archive, *given):
        calls.append(archive)
        if archive is archives(session)[failing]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        reserve(archive, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Archive, "reserve", fails)
        with pytest.raises(torch.OutOfMemoryError):
            run_session(session, 1, seed=1)
    assert calls
    assert session.past is past
    for archive, keys in zip(archives(session), before, strict=True):
        assert torch.equal(archive.keys[0][:, : keys.shape[1]], keys)
    fresh = Session(session.stack, TINY, session.state())
    again, other = (run_session(each, 3, seed=2) for each in (session, fresh))
    assert all(torch.equal(one, two) for one, two in zip(again, other, strict=True))


@dataclass(frozen=True)
class Fickle(PoolCompressor):
    """Gives places of its own from some frame on, or up to it."""

    from_frame: int = 16
    before: bool = False
    name = "test-fickle"

    @property
    def places(self):
        return "row" if self.before else "span"

    def compress(self, block, grid):
        made, span = super().compress(block, grid), block.span
        if (span.first_frame < self.from_frame) != self.before:
            return made
        places = made.span.coordinates[None].expand(made.keys.shape[0], -1, -1)
        return KVBlock(made.keys, made.values, Span(span.first_frame, span.frames, places))


@pytest.mark.parametrize("before", [False, True])
def test_places_of_their_own_for_all_blocks_or_none(before):
    session = Session(registry().stack("packforcing", {"compressor": Fickle(before=before)}), TINY)
    with pytest.raises(PolicyError, match=r"Fickle.compress returned .* must have [23] axes, for its places is"):
        run_session(session, 12)
    assert ledger(session).archive  # whose commit came before


@pytest.mark.parametrize("store", ["dense", "int8"])
@pytest.mark.parametrize("failing", range(TINY.layers))
def test_a_codec_that_fails_leaves_the_archive_as_it_was(store, failing, monkeypatch):
    """In whichever layer: a slot whose block leaves is written when all layers' blocks are encoded."""
    session = Session(registry().stack("packforcing", {"topk": 2, "archive_blocks": 2, "store": store}), TINY)
    run_session(session, 8)
    before = [[each.clone() for each in (*archive.keys, *archive.values)] for archive in archives(session)]
    codec, calls = type(session.stack.store), []
    encode = codec.encode_values

    def fails(self, values):
        calls.append(values)
        if len(calls) > failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(codec, "encode_values", fails)
        with pytest.raises(torch.OutOfMemoryError) as error:
            run_session(session, 1, seed=1)
    assert f"raised in {codec.__name__}.encode" in error.value.__notes__[0]
    for archive, stored in zip(archives(session), before, strict=True):
        assert all(map(torch.equal, (*archive.keys, *archive.values), stored))
    run_session(session, 3, seed=2)


@dataclass(frozen=True)
class Misplaced(PoolCompressor):
    """Gives places of its own in another number than tokens."""

    name = "test-misplaced"

    def compress(self, block, grid):
        made, span = super().compress(block, grid), block.span
        places = made.span.coordinates.repeat(2, 1)[None].expand(made.keys.shape[0], -1, -1)
        return KVBlock(made.keys, made.values, Span(span.first_frame, span.frames, places))


def test_places_of_another_number_are_refused_before_anything_is_written():
    session = Session(registry().stack("packforcing", {"compressor": Misplaced()}), TINY)
    with pytest.raises(PolicyError, match=r"Misplaced.compress returned places \(1, .* in layer 0, but"):
        run_session(session, 12)


def test_room_on_another_tier_is_for_the_model_s_device(monkeypatch):
    """So that it is pinned for CUDA, also where a fork makes it its own."""
    devices = []

    def noted(shape, dtype, device, tier):
        devices.append(device.type)
        return room(shape, dtype, device, tier)

    monkeypatch.setattr(archive_module, "room", noted)
    archive, like = Archive(4, tier="host"), torch.empty(1, 4, 2, 6, device="meta")
    archive.reserve(1, like)
    archive.fork().reserve(1, like)
    assert archive.keys[0].device.type == "cpu"
    assert devices == ["meta"] * 4


@pytest.mark.parametrize("store", ["int8", "int4", "residual", "fp8"])
def test_keys_of_several_blocks_are_those_of_each(store, monkeypatch):
    """What a selector sees is the same whether blocks are decoded together or one by one, and in any order."""
    from kvpack.memory import choice

    session = Session(registry().stack("packforcing", {"topk": 2, "store": store}), TINY)
    run_session(session, 8, batch=2)
    archive, plan = session.past.states[0].archive, session.stack.plan(session.past.book, 4, TINY)
    alone = [archive.block_keys(piece.slot, tokens) for piece, tokens in zip(plan.mid, plan.tokens, strict=True)]
    decoded, several = [], archive.blocks_keys
    monkeypatch.setattr(
        archive, "blocks_keys", lambda slots, ahead: decoded.append(len(slots)) or several(slots, ahead)
    )
    for order in (range(len(alone)), reversed(range(len(alone)))):
        keys = choice._keys(archive, plan)
        assert all(torch.equal(keys(block), alone[block]) for block in order)
    assert len(alone) > 3
    assert decoded[:2] == [len(alone), 1]  # in order all at once, backwards one by one


def test_a_fork_marks_slots_of_its_own():
    archive, like = Archive(4), torch.zeros(1, 4, 2, 12)
    archive.reserve(2, like)
    archive.write(0, archive.encoded(like, like))
    fork, before = archive.fork(), dict(archive.marks)
    fork.reserve(2, like)
    for slot in (0, 1):
        fork.write(slot, fork.encoded(like, like))
    assert archive.marks == before


@pytest.mark.parametrize("store", ["dense", "int8", "residual"])
def test_what_is_restored_is_what_was_written(store):
    archive, again = (Archive(4, registry().policy("codec", store)) for _ in range(2))
    blocks = torch.randn(3, 2, 2, 4, 2, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    places = torch.rand(3, 2, 4, 3, dtype=torch.float64)
    archive.reserve(3, blocks[0, 0], places[0])
    encoded = [archive.encoded(*block, where.float()) for block, where in zip(blocks, places, strict=True)]
    for slot, block in enumerate(encoded):
        archive.write(slot, block)
    for slot in (2, 0, 1):
        again.restore(slot, 3, torch.bfloat16, encoded[slot])
    for slot in range(3):
        assert torch.equal(again.block_keys(slot, 4), archive.block_keys(slot, 4))
        assert torch.equal(again.block_values(slot, 4), archive.block_values(slot, 4))
    assert torch.equal(again.key_sums, archive.key_sums)
    assert torch.equal(again.coordinates, archive.coordinates)
    assert archive.coordinates.dtype == torch.float32
    torch.testing.assert_close(archive.key_sums, blocks[:, 0].float().sum(dim=2).transpose(0, 1), rtol=0, atol=1e-6)


def test_a_block_of_another_form_is_not_restored():
    archive, generator = Archive(4), torch.Generator().manual_seed(0)
    block, other = (archive.encoded(*torch.randn(2, 1, 4, heads, 12, generator=generator)) for heads in (2, 3))
    archive.restore(0, 2, torch.float32, block)
    with pytest.raises(ValueError, match=r"dense stores .* but the block is"):
        archive.restore(1, 2, torch.float32, replace(block, keys=other.keys))
    with pytest.raises(ValueError, match=r"sums of keys are \(1, 3, 12\), unlike those of other blocks"):
        archive.restore(1, 2, torch.float32, other)


@pytest.mark.parametrize(
    ("frames", "bound", "slots"),
    [
        (48, 128, [9] * 9),  # all that the last chunk leaves, for good
        (48, 5, [5] * 9),
        (None, 128, [1, 2, 3, 4, 6, 6, 9, 9, 9]),
        (None, 5, [1, 2, 3, 4, 5, 5, 5, 5, 5]),
        (24, 128, [3, 3, 3, 4, 5, 6, 7, 8, 9]),  # longer than was said
    ],
)
def test_an_archive_grows_once_for_a_video_of_known_length(frames, bound, slots, monkeypatch):
    stack = registry().stack("packforcing", {"topk": 2, "sink_frames": 8, "archive_blocks": bound})
    session, made = Session(stack, replace(TINY, frames=frames)), []
    monkeypatch.setattr(archive_module, "room", lambda *given: made.append(given) or room(*given))
    run_session(session, 3)
    seen = [run_session(session, 1, seed=seed) and archives(session)[-1].slots for seed in range(9)]
    assert seen == slots
    assert len(made) == len(set(slots)) * 2 * TINY.layers
    assert resident(session.geometry, stack, 12, 1).bytes(TINY.layers) == session.stats()["resident_bytes"]


@pytest.mark.parametrize("bound", [None, 20])
def test_it_grows_once_too_if_a_chunk_leaves_in_pieces(bound, monkeypatch):
    options = {"chunk_frames": 3, "sink_frames": 8, "recent_frames": 4, "archive_blocks": bound}
    session, made = Session(registry().stack("packforcing", options), replace(TINY, frames=60)), []
    monkeypatch.setattr(archive_module, "room", lambda *given: made.append(given) or room(*given))
    run_session(session, 20)
    assert len(ledger(session).archive) == (bound or 32)
    assert len(made) == 2 * TINY.layers


def no_memory_for_the_second(room, after):
    calls = []

    def given(*what):
        calls.append(what)
        if len(calls) > after:
            raise torch.OutOfMemoryError("no memory for values")
        return room(*what)

    return given


@pytest.mark.parametrize("store", ["int8", "int4", "residual", "fp8"])
def test_keys_to_come_are_the_same_once_there_is_more_room(store, monkeypatch):
    """A commit that fails may have made room for its block, and the chunk is attended again."""
    archive, slots = Archive(4, registry().policy("codec", store)), torch.tensor([[0, 2, 1], [2, 3, 0]])
    for slot in range(4):
        block = torch.randn(2, 2, 4, 2, 12, generator=torch.Generator().manual_seed(slot))
        archive.reserve(slot + 1, block[0])
        archive.write(slot, archive.encoded(*block))
    monkeypatch.setattr(archive_module, "AT_ONCE", 2)
    keys, _, later = archive.gather(slice(0, 2), slots, 3)
    assert later is not None
    wanted = torch.stack([torch.cat([archive.block_keys(slot, 3)[row] for slot in slots[row]]) for row in range(2)])
    assert torch.equal(torch.cat(list(later()), dim=1), wanted)
    assert keys.shape == wanted.shape
    with monkeypatch.context() as patch:  # or for a part of it
        patch.setattr(archive_module, "room", no_memory_for_the_second(archive_module.room, len(archive.keys)))
        with pytest.raises(torch.OutOfMemoryError):
            archive.reserve(8, block[0])
    assert archive.keys[0].shape[1] > archive.slots == 4
    assert torch.equal(torch.cat(list(later()), dim=1), wanted)
    archive.reserve(8, block[0])
    assert archive.slots == 8
    assert torch.equal(torch.cat(list(later()), dim=1), wanted)
