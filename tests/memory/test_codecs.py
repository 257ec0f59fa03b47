"""Archives in other forms and on other tiers: errors, bytes, the same bits, what is refused."""

import inspect
import os
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from helpers import ledger
from kvpack import Geometry, Session
from kvpack.errors import InvalidOptionError, OutputError, PolicyError, UnusedOptionError
from kvpack.memory import codec as codec_module
from kvpack.memory.archive import Archive
from kvpack.memory.codec import DENSE, Codec, DenseCodec, stored_bytes
from kvpack.planning.resident import resident
from kvpack.plugins.registry import registry
from kvpack.plugins.resolve import stack_from_dict
from kvpack.policies.quantized import Float8Codec, Int4Codec, Int8Codec, ResidualCodec
from kvpack.testing import TINY, check_codec, check_policy, run_session

CODECS = [Int8Codec(), Int8Codec(3), Int4Codec(), Int4Codec(5), Float8Codec()]
CODECS += [ResidualCodec(stages=stages) for stages in (1, 2, 3, 4)]
SHAPE = (2, 7, 3, 4)
NUMBERS = arrays.arrays("float32", SHAPE, elements=st.floats(-60_000, 60_000, width=32))


def spread(numbers, dim):
    return numbers.amax(dim, keepdim=True) - numbers.amin(dim, keepdim=True), numbers.abs().amax(dim, keepdim=True)


@settings(max_examples=60, deadline=None)
@given(NUMBERS)
@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_errors_are_bounded_whatever_the_numbers(codec, numbers):
    given = torch.from_numpy(numbers)
    keys = codec.decode_keys(codec.encode_keys(given), SHAPE[1], torch.float32)
    values = codec.decode_values(codec.encode_values(given), SHAPE[1], torch.float32)
    for back, dim in ((keys, 1), (values, 3)):
        width, largest = spread(given, dim)
        if isinstance(codec, Float8Codec):
            bound = given.abs() / 16 + largest / 448 / 2**9 + 2**-126  # what is smaller is no normal number
        else:
            bound = width / (2**codec.bits - 1) / 2 + largest / 2**9 + 2**-16
        assert (back - given).abs().le(bound).all()


@pytest.mark.parametrize(("stages", "same"), [(2, Int4Codec()), (4, Int8Codec())], ids=repr)
def test_stages_of_two_bits_are_digits_of_one_number(stages, same):
    block, codec = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), ResidualCodec(stages=stages)
    for kind in ("keys", "values"):
        stored, other = (getattr(each, f"encode_{kind}")(block) for each in (codec, same))
        decoded = [getattr(codec, f"decode_{kind}")(stored, 7, torch.float32)]
        decoded.append(getattr(same, f"decode_{kind}")(other, 7, torch.float32))
        assert torch.equal(*decoded)
        assert [each.nbytes for each in stored] == [each.nbytes for each in other]


def test_stages_that_cannot_be():
    with pytest.raises(InvalidOptionError, match="stages must be at most 4, which are 8 bits, got 5"):
        ResidualCodec(stages=5)
    with pytest.raises(InvalidOptionError, match="packs four channels in a byte, but heads have 6; take int4 or int8"):
        ResidualCodec().encode_keys(torch.zeros(1, 2, 1, 6))


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("number", [0.0, 1.0, -3.5, 60_000.0])
def test_a_constant_comes_back(codec, number):
    block = torch.full(SHAPE, number)
    assert torch.equal(codec.decode_keys(codec.encode_keys(block), 7, torch.float32), block)
    assert torch.equal(codec.decode_values(codec.encode_values(block), 7, torch.float32), block)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(codec, number):
    block = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    block[1, 2, 0, 3] = number
    keys = codec.decode_keys(codec.encode_keys(block), 7, torch.float32)
    values = codec.decode_values(codec.encode_values(block), 7, torch.float32)
    assert not keys[1, 2, 0, 3].isfinite()
    assert not values[1, 2, 0, 3].isfinite()
    assert keys[0].isfinite().all()
    assert values[0].isfinite().all()


@pytest.mark.parametrize(
    ("codec", "most"),
    [(Int8Codec(), 0.55), (ResidualCodec(), 0.42), (Int4Codec(), 0.32), (Float8Codec(), 0.55)],
    ids=repr,
)
def test_bytes_at_the_size_of_a_model(codec, most):
    shape = (182, 12, 128, torch.bfloat16)
    block = torch.randn(1, *shape[:3]).bfloat16()
    counted = stored_bytes(codec, *shape)
    assert counted == sum(each.nbytes for each in (*codec.encode_keys(block), *codec.encode_values(block)))
    assert counted <= most * stored_bytes(DENSE, *shape)


@pytest.mark.parametrize(("store", "most"), [("int8", 0.55), ("fp8", 0.55), ("residual", 0.42), ("int4", 0.32)])
def test_bytes_of_archive_and_attended_blocks_at_the_size_of_a_model(store, most):
    geometry = Geometry(1, 12, 128, (30, 52), (44, 42, 42), dtype=torch.bfloat16)
    held = [
        resident(geometry, registry().stack("packforcing", {"store": each}), 134, 1).layer_bytes
        for each in ("dense", store)
    ]
    whole = 16 * 1560 * geometry.kv_bytes_per_token  # sink, recent and current frames
    assert held[1] - whole <= most * (held[0] - whole)


@pytest.mark.parametrize("store", ["int8", "int4", "residual", "fp8"])
def test_keys_that_are_decoded_whenever_they_are_rotated_are_those_that_would_be_held(store, monkeypatch):
    options = {"store": store, "topk": 3, "compressor": "keep-farthest"}
    later, session = outputs(options, chunks=12)
    assert all(len(each.arena.keyless) for each in session.caches)
    monkeypatch.setattr(Archive, "decodes_later", False)
    at_once, session = outputs(options, chunks=12)
    assert not any(len(each.arena.keyless) for each in session.caches)
    assert torch.equal(later, at_once)


@pytest.mark.parametrize("codec", [DENSE, *CODECS], ids=repr)
def test_the_contract_of_a_codec(codec):
    check_policy(codec)


class Longer(Int8Codec):
    """Announces fewer bytes than it stores."""

    def encode_values(self, values):
        stored = super().encode_values(values)
        return (*stored, values.new_zeros(len(values), 0 if values.device.type == "meta" else 1))

    def decode_values(self, stored, tokens, dtype):
        return super().decode_values(stored[:3], tokens, dtype)


class Mixed(Int8Codec):
    def encode_keys(self, keys):
        return super().encode_keys(keys - keys.mean(dim=0))


class Wide(Int8Codec):
    def decode_keys(self, stored, tokens, dtype):
        return super().decode_keys(stored, tokens, torch.float64)


class Hiding(Int8Codec):
    def decode_values(self, stored, tokens, dtype):
        return super().decode_values(stored, tokens, dtype).nan_to_num()


class Flat(Int8Codec):
    """Stores heads where several processes do not look for them."""

    def encode_keys(self, keys):
        codes, *scales = super().encode_keys(keys)
        return (codes.flatten(3), *scales)

    def decode_keys(self, stored, tokens, dtype):
        codes, *scales = stored
        return super().decode_keys((codes.unflatten(3, (-1, scales[0].shape[-1])), *scales), tokens, dtype)


class Viewing(Int8Codec):
    """Takes the keys for contiguous, which they need not be."""

    def encode_keys(self, keys):
        return super().encode_keys(keys.view(*keys.shape[:2], -1).view(keys.shape))


class Single(Int8Codec):
    def encode_keys(self, keys):
        return keys.half()

    def decode_keys(self, stored, tokens, dtype):
        return stored.to(dtype)


class Asking(Int8Codec):
    def encode_keys(self, keys):
        return super().encode_keys(keys / keys.abs().max().item())


class Zeros(Int8Codec):
    def decode_values(self, stored, tokens, dtype):
        return super().decode_values(stored, tokens, dtype) * 0


class Numbered(Int8Codec):
    def encode_keys(self, keys):
        return keys, 8


class Lost(Int8Codec):
    def encode_values(self, values):
        raise KeyError("lost")


class Nothing(Int8Codec):
    def decode_keys(self, stored, tokens, dtype):
        return None


class Couple(Int8Codec):
    def decode_values(self, stored, tokens, dtype):
        return super().decode_values(stored, tokens, dtype), tokens


@dataclass(frozen=True)
class Listing(Int8Codec):
    levels: list[int] = field(default_factory=lambda: [1, 2])


class Bare(Codec):
    name = "bare"
    encode_keys, decode_keys = DenseCodec.encode_keys, DenseCodec.decode_keys
    encode_values, decode_values = encode_keys, decode_keys


@dataclass
class Loose(Bare):
    bits: int = 8


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        (Numbered, r"Numbered\.encode_keys must return a tuple of tensors, got a tuple of Tensor, int"),
        (Lost, r"Lost fails in torch\.float32: KeyError: 'lost'"),
        (Nothing, r"Nothing\.decode_keys must give torch\.float32 \(1, 7, 3, 4\) back, as it was, got a NoneType"),
        (Couple, r"Couple\.decode_values must give .* back, as it was, got a tuple"),
        (Listing, r"Listing has a field that cannot be written as data, levels = \[1, 2\]; use numbers, text"),
        (Loose, "Loose must be a frozen dataclass"),
        (Bare, "Bare must be a frozen dataclass"),
        (Single, r"Single\.encode_keys must return a tuple of tensors, got a Tensor"),
        (Asking, r"Asking\.encode_keys must work on tensors without numbers .*; leave out \.item\(\)"),
        (Viewing, r"Viewing fails in torch\.float32: RuntimeError: view size is not compatible"),
        (Zeros, "gives values back that are further off"),
        (Longer, "announces .* bytes for 2 blocks, but stores"),
        (Mixed, "lets blocks influence each other: keys"),
        (Wide, r"Wide\.decode_keys must give torch.float32 \(1, 7, 3, 4\) back, as it was, got torch.float64"),
        (Hiding, "gives nan in values back as 0"),
        (Flat, "is by_head, so that the last axis but one of all that it stores must be heads"),
    ],
)
def test_a_codec_that_breaks_its_contract_is_told_how(codec, said):
    with pytest.raises(PolicyError, match=said):
        check_codec(codec())


@pytest.mark.parametrize("codec", [Single, Numbered, Nothing, Couple, Wide])
def test_the_engine_refuses_what_a_codec_must_not_give(codec):
    with pytest.raises(PolicyError, match=rf"{codec.__name__}\.(encode|decode)_\w+ must (return|give) .*, got "):
        Session(registry().stack("packforcing", {"store": codec()}), TINY)


def test_a_class_is_no_codec():
    with pytest.raises(
        InvalidOptionError, match=r"codec must be an instance, got the class Int8Codec; give Int8Codec\(\)"
    ):
        inspect.unwrap(check_codec)(Int8Codec)


def outputs(options, name="packforcing", chunks=9, geometry=TINY):
    session = Session(registry().stack(name, {"topk": 2, **options} if name == "packforcing" else options), geometry)
    return torch.cat(run_session(session, chunks, batch=2), dim=1), session


@pytest.mark.parametrize("store", ["dense", "int8", "int4", "residual", "fp8"])
@pytest.mark.parametrize("options", [{}, {"compressor": "pool"}, {"sink_frames": 6, "recent_frames": 3}], ids=repr)
def test_every_tier_gives_the_same_bits(store, options):
    there, _ = outputs({"store": store, **options})
    for tier in ("host", "disk"):
        here, session = outputs({"store": store, "tier": tier, **options})
        assert torch.equal(there, here)
        assert ledger(session).archive


def test_forms_are_as_close_as_their_bits():
    true, _ = outputs({})
    off = {
        store: (outputs({"store": store})[0] - true).norm() / true.norm()
        for store in ("int8", "fp8", "residual", "int4")
    }
    assert 0 < off["int8"] < off["fp8"]
    assert off["int8"] < off["residual"] < off["int4"] < 0.2
    assert off["int8"] < 0.01


@pytest.mark.parametrize("store", ["dense", "int8", "int4", "residual", "fp8"])
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_bytes_are_those_that_are_held(store, tier, dtype):
    geometry = replace(TINY, dtype=dtype)
    _, session = outputs({"store": store, "tier": tier}, geometry=geometry)
    stats = session.stats()
    assert resident(geometry, session.stack, 9, 2).bytes(TINY.layers) == stats["resident_bytes"]
    archives = [state.archive for state in session.past.states]
    held = sum(each.nbytes for archive in archives for each in (*archive.keys, *archive.values))
    assert stats["archive_bytes"] == held  # no spare slots in so short a video
    if tier == "device":
        other = outputs({"store": store, "tier": "disk"}, geometry=geometry)[1].stats()
        keys = sum(each.arena.values.nbytes - each.arena.keys.nbytes for each in session.caches)
        assert (keys == 0) == (store == "dense")
        assert stats["resident_bytes"] - other["resident_bytes"] == held - keys


def test_nothing_stays_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, session = outputs({"tier": "disk"})
    assert ledger(session).archive
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_told_and_the_past_is_as_it_was(monkeypatch):
    _, session = outputs({"tier": "disk"}, chunks=5)
    past = session.past

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(codec_module.os, "posix_fallocate", full)
        with pytest.raises(OutputError, match="No space left on device; set TMPDIR to another folder"):
            run_session(session, 8, batch=2)
    assert session.past.book.frames >= past.book.frames
    run_session(session, 2, batch=2)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_another_default_device_moves_no_tier(tier):
    with torch.device("meta"):
        assert codec_module.room((2, 3), torch.float32, torch.device("cpu"), tier).device.type == "cpu"


def test_storage_is_an_option_of_what_archives():
    made = registry().stack("framepack", {"store": "int8", "tier": "host"})
    assert (made.store, made.tier) == (Int8Codec(), "host")
    assert stack_from_dict(made.to_dict()) == made
    assert registry().stack("packforcing", {"store": Int4Codec(8)}).store == Int4Codec(8)
    for name in ("self-forcing", "memrope", "full"):
        with pytest.raises(UnusedOptionError, match=f"store has no effect: {name} archives no blocks"):
            registry().stack(name, {"store": "int8"})
    with pytest.raises(UnusedOptionError, match="tier has no effect"):
        registry().stack("packforcing", {"topk": 0, "tier": "host"})
    with pytest.raises(InvalidOptionError, match="tier must be one of device, host, disk, got 'moon'"):
        registry().stack("packforcing", {"tier": "moon"})
    with pytest.raises(InvalidOptionError, match="no codec named 'int9'"):
        registry().stack("packforcing", {"store": "int9"})
    with pytest.raises(InvalidOptionError, match="store must be a Codec"):
        replace(made, store="int8")

    with pytest.raises(InvalidOptionError, match=r"store must be frozen data, .* unhashable type: 'list'; use tuples"):
        replace(made, store=Listing())
