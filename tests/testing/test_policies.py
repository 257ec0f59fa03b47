"""`check_policy` refuses policies that are wrong where their results alone do not show it."""

from dataclasses import dataclass, replace

import pytest
import torch

from kvpack.errors import PolicyError
from kvpack.memory.blocks import KVBlock, Span, grid_coordinates
from kvpack.memory.codec import Codec
from kvpack.memory.roles import Candidates, Compressor, Query, Reindexer
from kvpack.memory.session import Session
from kvpack.memory.stack_state import with_places
from kvpack.plugins.registry import registry
from kvpack.policies import AbsoluteReindexer, ContiguousReindexer, PoolCompressor, QueryTopK, RecencySelector
from kvpack.testing import TINY, check_codec, check_policy, run_session


class Mean(Compressor):
    """Keeps the mean of a block's frames."""

    name = "mean"

    def span(self, first_frame, frames, grid):
        return Span(first_frame, frames, grid_coordinates(1, grid))

    def compress(self, block, grid):
        keys, values = (each.unflatten(1, (block.span.frames, -1)).mean(1) for each in (block.keys, block.values))
        return KVBlock(keys, values, self.span(block.span.first_frame, block.span.frames, grid))


def variant(base, **members):
    """Return a policy of a subclass."""
    return dataclass(frozen=True)(type("Wrong", (base,), {"name": "wrong", **members}))()


def after(base, method, what):
    """Return a subclass's policy one of whose methods also does something to its arguments."""

    def changed(self, *given):
        made = getattr(base, method)(self, *given)
        what(*given)
        return made

    return variant(base, **{method: changed})


def instead(base, method, what):
    """Return a subclass's policy that changes what one of its methods returns."""

    def changed(self, *given):
        return what(getattr(base, method)(self, *given), *given)

    return variant(base, **{method: changed})


class Plain(Codec):
    """Stores blocks as they are."""

    name = "plain"

    def encode_keys(self, block):
        return (block,)

    def decode_keys(self, stored, tokens, dtype):
        return stored[0]

    encode_values, decode_values = encode_keys, decode_keys


class Levels(Mean):
    """Attends two tokens of an older block."""

    def level(self, age):
        return int(age > 1)

    def shrunk_span(self, span, grid, level):
        return replace(span, coordinates=span.coordinates[:2])

    def shrunk(self, block, grid, level):
        return KVBlock(block.keys[:, :2], block.values[:, :2], self.shrunk_span(block.span, grid, level))


@pytest.mark.parametrize("base", [Mean, Levels, Plain])
def test_what_the_wrong_ones_are_made_of_is_right(base):
    check_policy(variant(base))


@pytest.mark.parametrize(
    ("base", "method", "write"),
    [
        (RecencySelector, "select", lambda query, _: query.queries.mul_(2)),
        (RecencySelector, "select", lambda _, candidates: candidates.key_sums.zero_()),
        (RecencySelector, "select", lambda _, candidates: candidates.keys(0).mul_(2)),
        (Mean, "compress", lambda block, _: block.keys.zero_()),
        (Mean, "merged", lambda older, *_: older.keys.zero_()),
        (Levels, "shrunk", lambda block, *_: block.keys.mul_(1.1)),
        (ContiguousReindexer, "place", lambda layout: layout.lengths.mul_(2)),
        (Plain, "encode_keys", lambda block: block.mul_(1.01)),
        (Plain, "decode_values", lambda stored, *_: stored[0].mul_(0.9)),
    ],
)
def test_writing_into_what_is_given_is_refused(base, method, write):
    with pytest.raises(PolicyError, match=f"Wrong.{method} writes in place into a tensor"):
        check_policy(after(base, method, write))


def test_a_codec_alone_is_watched_too():
    with pytest.raises(PolicyError, match="encode_values writes in place"):
        check_codec(after(Plain, "encode_values", lambda block: block.zero_()))


def wide(block, *_):
    return replace(block, keys=block.keys.float())


def scores(self, query: Query, candidates: Candidates):
    return torch.einsum("bthd,bmhd->bm", query.queries, candidates.key_sums)  # which are float32


def varying(span, first_frame, frames, grid):
    return replace(span, coordinates=grid_coordinates(frames if first_frame % 8 else 1, grid))


def moving(span, first_frame, *_):
    return replace(span, coordinates=span.coordinates + first_frame % 3)


def mixed(blocks, *_):
    return [replace(each, keys=each.keys + blocks[0].keys) for each in blocks]


def coupled(_, layout):
    placement = ContiguousReindexer().place(layout)
    return replace(placement, starts=layout.first_frames.mean(0, keepdim=True).expand_as(placement.starts))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (instead(Mean, "compress", wide), "keys torch.float32 in layer 0, but the model's dtype is torch.bfloat16"),
        (variant(QueryTopK, scores=scores), "Wrong fails in torch.bfloat16: RuntimeError: expected scalar type"),
        (instead(Mean, "span", varying), "gives 80 tokens for 4 frames from frame 12, and 20 from frame 0"),
        (instead(Mean, "span", moving), "or other places; both must be the same wherever"),
        (instead(Mean, "compress_all", mixed), "compress_all makes of block 0 of 2 something else than compress"),
        (instead(Mean, "compress_all", lambda blocks, *_: blocks[::-1]), "compress_all makes of block 0 of 2"),
        (instead(Mean, "compress", lambda block, *_: replace(block, keys=block.keys * torch.nan)), "infinite or NaN"),
        (variant(Reindexer, place=coupled), "batch rows influence each other"),
        (variant(AbsoluteReindexer, shared=True), "shared = True, but its positions depend on which blocks"),
        (variant(Reindexer, place=ContiguousReindexer.place, absolute=True), "absolute = True, but places frames"),
    ],
)
def test_what_does_not_hold_is_refused(policy, message):
    with pytest.raises(PolicyError, match=message):
        check_policy(policy)


class OwnPlaces(Mean):
    places = "row"


def shifted(offset):
    return lambda span, *_: replace(span, coordinates=span.coordinates + torch.tensor(offset))


def elsewhere(block, *_):
    block = with_places(block)
    return replace(block, span=replace(block.span, coordinates=block.span.coordinates - 1))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (instead(Mean, "span", shifted([4.0, 0, 0])), r"Wrong.span puts a token at \(t, y, x\) = \(4.0, 0.0, 0.0\)"),
        (instead(Mean, "span", shifted([0, 0.5, 0])), r"\(0.0, 3.5, 0.0\), .* from \(0, 0, 0\) to \(0, 3, 4\)"),
        (instead(Mean, "merged", elsewhere), "Wrong.merged puts a token at .* outside of its block of 8 frames"),
        (instead(OwnPlaces, "compress", elsewhere), "Wrong.compress puts a token at .* of its block of 4 frames"),
        (instead(Levels, "shrunk_span", shifted([0, 0, -1.0])), r"Wrong.shrunk_span puts a token at .* -1\.0\)"),
    ],
)
def test_a_token_outside_of_its_block_is_refused(policy, message):
    with pytest.raises(PolicyError, match=message):
        check_policy(policy)


@pytest.mark.parametrize(("places", "own"), [("span", True), ("row", False), ("head", True)])
def test_the_engine_refuses_places_of_another_kind_than_said(places, own):
    def compress(self, block, grid):
        made = PoolCompressor.compress(self, block, grid)
        return with_places(made) if own else made

    policy = variant(PoolCompressor, places=places, compress=compress)
    session = Session(registry().stack("packforcing", {"compressor": policy, "sink_frames": 4}), TINY)
    with pytest.raises(PolicyError, match=rf"Wrong.compress returned places .* axes, for its places is '{places}'"):
        run_session(session, 12)
    with pytest.raises(PolicyError, match=f"for its places is '{places}'"):
        check_policy(policy)


def test_a_merged_block_has_places_as_those_that_it_is_made_of():
    def announced(both, *_):
        return replace(both, span=Span(0, 8, both.span.coordinates[0]))

    with pytest.raises(PolicyError, match=r"Wrong\.merged returned places .* must have 3 axes, as those of what it is"):
        check_policy(instead(PoolCompressor, "merged", announced))
