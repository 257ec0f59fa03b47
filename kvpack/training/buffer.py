"""A packed buffer that lets gradients through to what it is filled with."""

from collections.abc import Iterable

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import pad

from kvpack.memory.rope import rotate
from kvpack.memory.session import Session
from kvpack.memory.store import Attention, PackedBuffer

Cut = tuple[Tensor, Tensor]


class GraphBuffer(PackedBuffer):
    """A packed buffer whose history is detached from the graph that made it, and collects gradients.

    A backward pass stops at the history and adds up there; `backward_history` carries the sums on, once. So the
    denoising steps of a chunk need the memory of one, however many there are.
    """

    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        #: Rotated keys, and values, each as made and cut off; None before they are attended.
        self.made: tuple[Cut, Cut] | None = None

    def clear(self, rows: int, capacity: int, like: Float[Tensor, "rows tokens heads head_dim"]) -> None:
        """Empty the buffer."""
        self.keys = self.values = like.new_empty(rows, 0, *like.shape[2:])
        self.lengths, self._parts, self.made = [0] * rows, {}, None

    def append(
        self,
        rows: slice,
        keys: Float[Tensor, "some tokens heads head_dim"],
        values: Float[Tensor, "some tokens heads head_dim"],
        turns: Complex[Tensor, "any tokens 1 half"],
    ) -> None:
        """Append history to the history of these rows."""
        self._parts.setdefault(rows.start, []).append((rotate(keys, turns), values))
        self.lengths[rows] = [self.lengths[rows][0] + keys.shape[1]] * keys.shape[0]

    def attend(
        self,
        queries: Float[Tensor, "rows tokens heads head_dim"],
        keys: Float[Tensor, "rows tokens heads head_dim"],
        values: Float[Tensor, "rows tokens heads head_dim"],
        turns: Complex[Tensor, "any tokens 1 half"],
        attention: Attention,
    ) -> Float[Tensor, "rows tokens heads head_dim"]:
        """Attend history and the current keys and values."""
        if self._parts:
            self._cut()
        queries, keys = rotate(queries, turns), rotate(keys, turns)
        results = []
        for rows in self._equal_rows():
            length = self.lengths[rows][0]
            attended = [
                torch.cat([history[rows, :length], current[rows]], dim=1)
                for history, current in ((self.keys, keys), (self.values, values))
            ]
            results.append(attention(queries[rows], *attended))
        return results[0] if len(results) == 1 else torch.cat(results)

    def _cut(self) -> None:
        longest = max(self.lengths)

        def joined(index: int) -> Tensor:
            rows = [torch.cat([part[index] for part in self._parts[start]], dim=1) for start in sorted(self._parts)]
            return torch.cat([pad(each, (0, 0, 0, 0, 0, longest - each.shape[1])) for each in rows])

        # The denoising steps of a chunk share leaves, so that their gradients add up in one place.
        made, self._parts = (joined(0), joined(1)), {}
        self.keys, self.values = (each.detach().requires_grad_(each.requires_grad) for each in made)
        self.made = (made[0], self.keys), (made[1], self.values)


def histories(session: Session) -> list[Cut]:
    """Return each layer's history of the chunk in progress, as pairs of (tensor in the graph, detached tensor)."""
    made = [layer.buffer.made for layer in session.layers if isinstance(layer.buffer, GraphBuffer)]
    return [cut for each in made for cut in each or ()]


def backward_history(cuts: Iterable[Cut], again: bool = False) -> None:
    """Propagate the gradients collected at histories into the graphs that made these histories.

    Args:
        cuts: histories, from `histories`.
        again: whether a later history has parts of this one, so that their graph is kept.
    """
    with_gradients = [(made, cut.grad) for made, cut in cuts if cut.grad is not None]
    if with_gradients:
        torch.autograd.backward([made for made, _ in with_gradients], [grad for _, grad in with_gradients], again)
