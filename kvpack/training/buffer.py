"""A layer's memory that lets gradients through to what it attends."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpack.memory.attended import Attention, Rotations
from kvpack.memory.base import Attended
from kvpack.memory.codec import DENSE, Codec, DenseCodec, Stored
from kvpack.memory.geometry import Geometry
from kvpack.memory.layer import LayerCache
from kvpack.memory.plan import Plan
from kvpack.memory.rope import joined_places, rotate, rotations
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
from kvpack.memory.store import KeysValues, StoredBlock
from kvpack.memory.tokens import Tokens

Cut = tuple[Tensor, Tensor]


class GraphContext:
    """History that is cut off the graph that made it, and attended as it is.

    A backward pass stops at the history and adds up there; `backward_history` carries the sums on, once. So the
    denoising steps of a chunk need the memory of one, however many there are.
    """

    def __init__(self, attended: Attended, like: Tensor, geometry: Geometry) -> None:
        by_row = isinstance(attended.tokens, list)
        groups = attended.tokens if isinstance(attended.tokens, list) else [attended.tokens]
        lengths = [sum(map(len, tokens)) for tokens in groups]
        self.lengths = lengths if by_row else lengths * like.shape[0]
        longest, nothing = max(self.lengths), like.detach()[: 1 if by_row else None, :0]
        made = [_joined(tokens, nothing, attended.rotations, geometry) for tokens in groups]
        # Only so that they are one tensor: `attend` cuts each row at its own length.
        padded = [[pad(each, (0, 0, 0, 0, 0, longest - each.shape[1])) for each in pair] for pair in made]
        keys, values = (torch.cat(each) for each in zip(*padded, strict=True))
        # Leaves, in whose `grad` the denoising steps add up; without gradients where what made them has none.
        self.keys, self.values = (each.detach().requires_grad_(each.requires_grad) for each in (keys, values))
        #: Rotated keys, and values, each as made and cut off.
        self.made: tuple[Cut, Cut] = (keys, self.keys), (values, self.values)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, turns: Rotations, attention: Attention) -> Tensor:
        """Attend history and the current keys and values."""
        queries, keys = rotate(queries, turns), rotate(keys, turns)
        results = []
        # Rows of one length in one call; others each alone, since padding would be attended without a mask.
        together = len(self.lengths) if len(set(self.lengths)) == 1 else 1
        for row in range(0, len(self.lengths), together):
            rows, length = slice(row, row + together), self.lengths[row]
            attended = [
                torch.cat([history[rows, :length], current[rows]], dim=1)
                for history, current in ((self.keys, keys), (self.values, values))
            ]
            results.append(attention(queries[rows], *attended))
        return results[0] if len(results) == 1 else torch.cat(results)

    def keep(self, keys: Tensor, values: Tensor) -> StoredBlock:
        """Store the tensors themselves, with their graph if they have one."""
        return StoredBlock(keys.shape[1], (keys, values))

    def history(self) -> KeysValues:
        """Return rotated keys and values."""
        return self.keys, self.values

    @contextmanager
    def beside(self, tokens: int) -> Iterator[None]:
        """Do nothing: nothing current is held here."""
        yield


class GraphLayer(LayerCache):
    """A layer whose history has gradients."""

    differentiable: ClassVar[bool] = True

    def _laid_out(self, attended: Attended, like: Tensor, plan: Plan) -> GraphContext:
        return GraphContext(attended, like, plan.geometry)


@dataclass(frozen=True)
class StraightThrough(DenseCodec):
    """Stores what another codec would give back, with the gradient of what it was given: rounding itself has none."""

    codec: Codec
    name = "straight-through"

    def encode_keys(self, keys: Tensor) -> Stored:
        """Return the keys as they will come back."""
        return self._rounded(keys, self.codec.decode_keys(self.codec.encode_keys(keys), keys.shape[1], keys.dtype))

    def encode_values(self, values: Tensor) -> Stored:
        """Return the values as they will come back."""
        back = self.codec.decode_values(self.codec.encode_values(values), values.shape[1], values.dtype)
        return self._rounded(values, back)

    def _rounded(self, given: Tensor, back: Tensor) -> Stored:
        return (back.detach() + (given - given.detach()),)  # a sum with zero, so that no bit changes


def straight_through(stack: Stack) -> Stack:
    """Return a stack whose archive lets gradients through, in whatever form it is stored."""
    return stack if stack.store == DENSE else replace(stack, store=StraightThrough(stack.store))


def _joined(
    parts: tuple[Tokens, ...], nothing: Tensor, turns: tuple[Tensor, ...] | None, geometry: Geometry
) -> KeysValues:
    """Return rotated keys and values of parts in one."""
    made = [[each.keys] if each.later is None else each.later() for each in parts]
    keys = torch.cat([nothing, *(each for some in made for each in some)], dim=1)
    values = torch.cat([nothing, *(each.values for each in parts)], dim=1)
    if not parts:
        return keys, values
    if not turns:
        turns = (rotations(joined_places([each.coordinates for each in parts]), geometry),)
    return rotate(keys, joined_places(turns)), values


def histories(session: Session) -> list[Cut]:
    """Return the history that every layer attends for the chunk in progress, as it was made and as it is attended."""
    contexts = [leaf.context for cache in session.caches for leaf in cache.leaves]
    return [cut for each in contexts if isinstance(each, GraphContext) for cut in each.made]


def backward_history(cuts: Iterable[Cut], again: bool = False) -> None:
    """Carry the gradients that have added up at histories on to what made them.

    Args:
        cuts: histories, from `histories`.
        again: whether a later history has parts of this one, so that their graph is kept.
    """
    with_gradients = [(made, cut.grad) for made, cut in cuts if cut.grad is not None]
    if with_gradients:  # none where the chunk attends nothing that is learned
        torch.autograd.backward([made for made, _ in with_gradients], [grad for _, grad in with_gradients], again)
