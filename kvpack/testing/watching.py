"""A copy of a policy, watched call by call: what it is given stays as it was, and what it says of itself holds."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvpack.errors import PolicyError
from kvpack.memory.base import Memory
from kvpack.memory.blocks import KVBlock, Span
from kvpack.memory.codec import Codec
from kvpack.memory.policy import Policy
from kvpack.memory.roles import Candidates, Compressor, LatentCompressor, Layout, Placement, Reindexer, Selector

P = TypeVar("P", bound=Policy)

#: How far outside of a block the mean of places in it may be.
_ROUNDING = 1e-3

_METHODS: dict[type[Policy], tuple[str, ...]] = {
    Compressor: ("compress", "compress_all", "merged", "shrunk", "span", "shrunk_span"),
    LatentCompressor: ("tokens",),
    Selector: ("select",),
    Reindexer: ("place",),
    Codec: ("encode_keys", "encode_values", "decode_keys", "decode_values"),
    Memory: ("attend", "remember", "forget", "happened", "veto"),
}


def watched(policy: P) -> P:
    """Return an equal copy of a policy, a dataclass, whose methods raise `PolicyError` at what results do not show.

    That is: writing in place into what they are given; a span that depends on where it is; `compress_all` that does not
    do what `compress` does; a re-indexer that is not `shared` or `absolute` as it says; tokens outside of
    the block that they stand for.
    """
    copy = replace(policy)  # type: ignore[type-var]
    for role, methods in _METHODS.items():
        for name in methods if isinstance(policy, role) else ():
            call = partial(_leaving, f"{type(policy).__name__}.{name}", getattr(copy, name))
            promise = _PROMISES.get(name)
            vars(copy)[name] = call if promise is None else partial(promise, copy, call)
    return copy


def _leaving(name: str, call: Callable[..., Any], *given: Any) -> Any:
    """Return what a call returns, which must leave the tensors that it is given as they are."""
    seen = [(each, each.clone()) for each in _tensors(given)]

    def look(keys: Callable[[int], Tensor], block: int) -> Tensor:
        found = keys(block)
        seen.append((found, found.clone()))
        return found

    looked = [replace(one, keys=partial(look, one.keys)) if isinstance(one, Candidates) else one for one in given]
    made = call(*looked)
    if not all(_same(each, before) for each, before in seen):
        raise PolicyError(f"{name} writes in place into a tensor that it is given, and that others hold; copy it first")
    return made


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same bits, NaN included; those without data (meta) have."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = [each.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for each in (one, other)]
    return one.is_meta or torch.equal(*bits)


def _tensors(given: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a method is given."""
    if isinstance(given, Tensor):
        yield given
    elif is_dataclass(given):
        yield from _tensors([getattr(given, each.name) for each in fields(given)])
    elif isinstance(given, tuple | list):
        for each in given:
            yield from _tensors(each)


def _same_span(policy: Compressor, span: Callable[..., Span], first_frame: int, frames: int, grid: Any) -> Span:
    """Check that tokens and places are those of the first frames, by which slots and plans are made."""
    made, first = span(first_frame, frames, grid), span(0, frames, grid)
    if not _same(made.coordinates, first.coordinates):
        raise PolicyError(
            f"{type(policy).__name__}.span gives {made.tokens} tokens for {frames} frames from frame {first_frame}, "
            f"and {first.tokens} from frame 0, or other places; both must be the same wherever the frames are"
        )
    _require_within(policy, "span", made.coordinates, frames, grid)
    return made


def _require_within(policy: Compressor, method: str, places: Tensor, frames: int, grid: tuple[int, int]) -> None:
    """Raise `PolicyError` if a token sits outside of the frames or the grid of its block."""
    last, places = torch.tensor([frames, *grid]) - 1, places.reshape(-1, 3)
    inside = (places > -_ROUNDING) & (places < last + _ROUNDING)
    for place in places[~inside.all(dim=1)][:1].tolist():
        raise PolicyError(
            f"{type(policy).__name__}.{method} puts a token at (t, y, x) = {tuple(place)}, outside of its block of "
            f"{frames} frames, which is from (0, 0, 0) to {tuple(last.tolist())}; count t from the block's first frame"
        )


def _require_inside(policy: Compressor, method: str, block: object, frames: int, grid: tuple[int, int]) -> None:
    """Do as `_require_within` for a block whose tokens have places of their own; the engine checks what else it is."""
    if isinstance(block, KVBlock) and block.own_places is not None:
        _require_within(policy, method, block.own_places, frames, grid)


def _shrunk_inside(policy: Compressor, shrunk_span: Callable[..., Span], span: Span, grid: Any, level: int) -> Span:
    """Check the places of a block that is attended smaller."""
    made = shrunk_span(span, grid, level)
    _require_within(policy, "shrunk_span", made.coordinates, span.frames, grid)
    return made


def _merged_inside(
    policy: Compressor, merged: Callable[..., KVBlock], older: KVBlock, newer: KVBlock, grid: Any
) -> KVBlock:
    """Check the places of two blocks in one."""
    made = merged(older, newer, grid)
    _require_inside(policy, "merged", made, older.span.frames + newer.span.frames, grid)
    return made


def _as_alone(
    policy: Compressor, compress_all: Callable[..., list[KVBlock]], blocks: Sequence[KVBlock], grid: Any
) -> list[KVBlock]:
    """Check that blocks of several layers are what each of them is alone, and their places."""
    made = compress_all(blocks, grid)
    for block, given in zip(made, blocks, strict=False):  # how many is checked by the engine
        _require_inside(policy, "compress", block, given.span.frames, grid)
    if type(policy).compress_all is Compressor.compress_all:
        return made
    for index, (together, block) in enumerate(zip(made, blocks, strict=False)):
        pairs = zip(_tensors(together), _tensors(policy.compress(block, grid)), strict=False)
        if not all(a.shape == b.shape and torch.allclose(a, b, 1e-2, 1e-2, equal_nan=True) for a, b in pairs):
            raise PolicyError(
                f"{type(policy).__name__}.compress_all makes of block {index} of {len(blocks)} something else than "
                "compress does; it must return what compress does of each, in their order"
            )
    return made


def _as_said(policy: Reindexer, place: Callable[[Layout], Placement], layout: Layout) -> Placement:
    """Check what a re-indexer says of all of its placements."""
    made, name, mid = place(layout), type(policy).__name__, layout.columns("mid")
    later = layout.first_frames.clone()
    later[:, mid] += layout.frames[:, mid]
    if policy.shared and not _equal(made, place(replace(layout, first_frames=later))):
        raise PolicyError(f"{name} says shared = True, but its positions depend on which blocks were chosen")
    start = layout.frames.new_full((len(layout.frames),), layout.chunk_first_frame)
    if policy.absolute and not _equal(made, Placement(layout.first_frames, layout.frames, start)):
        raise PolicyError(f"{name} says absolute = True, but places frames elsewhere than at their index in the video")
    return made


def _equal(one: Placement, other: Placement) -> bool:
    return all(_same(a, b) for a, b in zip(_tensors(one), _tensors(other), strict=False))


_PROMISES: dict[str, Callable[..., Any]] = {
    "span": _same_span,
    "shrunk_span": _shrunk_inside,
    "merged": _merged_inside,
    "compress_all": _as_alone,
    "place": _as_said,
}
