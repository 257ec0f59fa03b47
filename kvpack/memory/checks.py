"""What a memory returns, checked at the boundary."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpack.errors import PolicyError
from kvpack.memory.attribution import broken
from kvpack.memory.base import Attended, Memory
from kvpack.memory.tokens import Tokens

if TYPE_CHECKING:
    from kvpack.memory.layer import LayerCache


def check_attended(memory: Memory, attended: object, like: Tensor, layer: int) -> None:
    """Raise `PolicyError` if what a memory wants attended does not fit the model."""
    wrong = partial(broken, memory, "attend", layer=layer)
    if not isinstance(attended, Attended):
        raise wrong(type(attended).__name__, "it must be Attended")
    start, tokens = attended.chunk_start, attended.tokens
    if not isinstance(start, Tensor) and not (isinstance(start, int | float) and math.isfinite(start)):
        raise wrong(f"chunk_start {start!r}", "it must be a finite number")
    rows, count = like.shape[:2]
    if isinstance(start, Tensor) and start.shape not in ((), (1,), (rows,)):
        raise wrong(f"chunk_start {tuple(start.shape)}", f"it must be a number or ({rows},)")
    if not isinstance(attended.hidden, int) or not 0 <= attended.hidden <= count:
        raise wrong(f"hidden {attended.hidden!r}", f"it must be an int from 0 to {count}")
    if not isinstance(tokens, tuple | list):
        raise wrong(type(tokens).__name__, "it must be a tuple of Tokens")
    groups, together = (tokens, 1) if isinstance(tokens, list) else ([tokens], rows)
    if len(groups) * together != rows or not all(isinstance(each, tuple) for each in groups):
        kinds = ", ".join(type(each).__name__ for each in groups)
        raise wrong(
            f"a list of {kinds or 'nothing'}",
            f"a list holds a tuple of Tokens for each of {rows} rows; give a tuple where rows attend alike",
        )
    if not memory.in_place:  # in place, the engine has made them itself
        for each in chain.from_iterable(groups):
            check_tokens(memory, each, like[:together], layer)


def check_tokens(memory: Memory, tokens: object, like: Tensor, layer: int) -> None:
    """Raise `PolicyError` if tokens that a memory wants attended do not fit the model."""
    wrong = partial(broken, memory, "attend", layer=layer)
    if not isinstance(tokens, Tokens):
        raise wrong(type(tokens).__name__, "it must be Tokens")
    wanted = (like.shape[0], len(tokens), *like.shape[2:])
    for what, tensor in (("keys", tokens.keys), ("values", tokens.values)):
        if tuple(tensor.shape) != wanted or tensor.dtype != like.dtype or tensor.device != like.device:
            given = f"{what} {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise wrong(given, f"they must be {like.dtype} {wanted} on {like.device}")
    shape = tuple(tokens.coordinates.shape)
    if shape[1:] not in ((wanted[1], 3), (wanted[1], wanted[2], 3)) or shape[0] not in (1, wanted[0]):
        rule = f"they must be (1 or {wanted[0]}, {wanted[1]}, 3), or with an axis of heads before the last"
        raise wrong(f"coordinates {shape}", rule)


def vetoes(memory: Memory, made: Sequence[object], rows: int) -> tuple[Tensor | None, tuple[Any, ...]]:
    """Return the vetoed rows, None if there are none, and the states of all layers; waits for the device once.

    Args:
        memory: the policy.
        made: what its `veto` returned, by layer.
        rows: of the batch.

    Raises:
        PolicyError: unless each is a boolean tensor `[rows]`, the same in all layers, and a state.
    """
    for layer, each in enumerate(made):
        if not isinstance(each, tuple) or len(each) != 2:
            raise broken(memory, "veto", type(each).__name__, "it must be (rows, state)", layer)
        vetoed = each[0]
        given = f"{vetoed.dtype} {tuple(vetoed.shape)}" if isinstance(vetoed, Tensor) else type(vetoed).__name__
        if given != f"{torch.bool} {(rows,)}":
            raise broken(memory, "veto", given, f"rows are {torch.bool} {(rows,)}", layer)
    every, states = zip(*made, strict=True)  # type: ignore[arg-type]
    first, *others = _together(every).tolist()  # all layers in one wait
    if any(each != first for each in others):
        name = type(memory).__name__
        raise PolicyError(f"{name}.veto vetoes other rows in one layer than in another, but all must veto the same")
    return every[0] if any(first) else None, states


def signs(attended: Attended) -> list[Tensor]:
    """Return scalars that are all finite if what is attended is; nothing waits for the device."""
    # The sum of numbers is finite only if each of them is; what overflows is looked at again.
    tensors = (tensor for each in attended.parts for tensor in (each.keys, each.values, each.coordinates))
    return [tensor.detach().sum(dtype=torch.float32) for tensor in tensors]


def check_layers(caches: "Sequence[LayerCache]") -> bool:
    """Return whether nothing that a memory did in this chunk looks wrong; all layers in one wait for the device."""
    leaves = [leaf for cache in caches for leaf in cache.leaves]
    every = [leaf.attended for leaf in leaves if leaf.attended is not None]
    signs = [sign for leaf in leaves for sign in leaf.signs]
    doubts = [each.suspect for each in every if each.suspect is not None]
    choices: dict[tuple[int, torch.Size], list[Tensor]] = {}  # by shape, so that layers alike are one tensor
    for each in every:
        if each.selected is not None and each.candidates and each.selected.numel():
            choices.setdefault((each.candidates, each.selected.shape), []).append(each.selected)
    wrong = [~_together(signs).isfinite().all()] if signs else []
    wrong += [_together(doubts).any()] if doubts else []
    for (count, _), alike in choices.items():
        chosen = _together(alike)
        # Each row ascends: its ends say whether any is out of range.
        wrong += [((chosen[..., 0] < 0) | (chosen[..., -1] >= count)).any()]
        wrong += [(chosen[..., 1:] == chosen[..., :-1]).any()]
    return not wrong or not bool(_together(wrong).any())  # waits, once for all layers


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape in one; those that layers share are there once."""
    # Alike by identity: to compare numbers would wait for the device.
    return torch.stack([each.to(tensors[0].device) for each in {id(each): each for each in tensors}.values()])
