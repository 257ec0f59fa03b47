"""A layer whose heads are served by several stacks: attention is called for each, with its heads."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpack.memory.attended import Attention
from kvpack.memory.divided import Divided, DividedPlan, Part
from kvpack.memory.geometry import Geometry
from kvpack.memory.layer import Forward, LayerCache
from kvpack.memory.plan import Plan
from kvpack.memory.sending import sent
from kvpack.memory.store import KeysValues, Workspace


class DividedLayer(LayerCache):
    """The caches of a layer's parts.

    Args:
        memory: the policy.
        index: index of the layer.
        parts: which heads each cache has.
        caches: the caches.
        firsts: the first cache in the model of each part's stack and number of heads.
    """

    def __init__(
        self,
        memory: Divided,
        index: int,
        parts: Sequence[Part],
        caches: Sequence[LayerCache],
        firsts: Sequence[LayerCache],
    ) -> None:
        super().__init__(memory, index, caches[0].workspace)
        self.parts, self._caches, self._firsts = parts, tuple(caches), firsts
        order = [head for part in parts for head in part.heads]
        #: Where each head's output lies behind those of all parts; None where they lie in order.
        self._back = None if order == sorted(order) else sorted(range(len(order)), key=order.__getitem__)
        self._indices: dict[torch.device, tuple[list[Tensor], Tensor]] = {}

    @property
    def leaves(self) -> tuple[LayerCache, ...]:
        """The caches of its parts."""
        return self._caches

    def attend(self, forward: Forward, queries: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        """Return the attention of all heads; arguments as those of `LayerCache.attend`."""
        each = []
        for i, cache in enumerate(self._caches):
            q, k, v = (self._heads(i, all_heads) for all_heads in (queries, keys, values))
            each.append(cache.attend(self._forward(forward, i), q, k, v, attention))
        self.attended = self._caches[0].attended
        self.lengths = self._mean_lengths()
        return self._joined(each)

    def history(self) -> KeysValues:
        """Return rotated keys, and values, of history; heads that attend fewer tokens end in 0."""
        keys, values = zip(*(cache.history() for cache in self._caches), strict=True)
        most = max(each.shape[1] for each in keys)
        longer = [[pad(one, (0, 0, 0, 0, 0, most - one.shape[1])) for one in each] for each in (keys, values)]
        return self._joined(longer[0]), self._joined(longer[1])

    def _joined(self, each: Sequence[Tensor]) -> Tensor:
        """Return `[rows, tokens, heads, head_dim]` of all heads, given those of each part."""
        if len(each) == 1:
            return each[0]
        out = torch.cat(list(each), dim=2)
        return out if self._back is None else out.index_select(2, self._on(out.device)[1])

    def committed(self) -> Any:
        """Return the states that the parts attended, and the chunks that become history, one of each for each part."""
        return tuple(zip(*(cache.committed() for cache in self._caches), strict=True))

    def explain(self, plan: Plan) -> None:
        """Raise `PolicyError` if what a part attended breaks the contract; waits for the device."""
        assert isinstance(plan, DividedPlan)
        for part, cache in zip(self.parts, self._caches, strict=True):
            cache.explain(plan.plans[part.kind])

    def clear(self) -> None:
        """End the chunk in progress."""
        super().clear()
        for cache in self._caches:
            cache.clear()

    def _forward(self, forward: Forward, index: int) -> Forward:
        """Return a forward as a part sees it."""
        assert isinstance(forward.plan, DividedPlan)
        # A layer looks at its own state only.
        # None follows it, so that nothing is read ahead: no part has an archive.
        states = (*(None,) * self.index, forward.states[self.index][index])
        plan = forward.plan.plans[self.parts[index].kind]
        return replace(forward, plan=plan, first=self._firsts[index], states=states)

    def _heads(self, index: int, every: Tensor) -> Tensor:
        """Return a part's heads; a view, where they lie side by side."""
        heads = self.parts[index].heads
        if heads[-1] - heads[0] + 1 == len(heads):
            return every[:, :, heads[0] : heads[-1] + 1]
        return every.index_select(2, self._on(every.device)[0][index])

    def _on(self, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """Return each part's heads, and where to find each head's output, copied to the device once."""
        if device not in self._indices:
            heads = [sent(torch.tensor(part.heads), device) for part in self.parts]
            self._indices[device] = heads, sent(torch.tensor(self._back or [], dtype=torch.long), device)
        return self._indices[device]

    def _mean_lengths(self) -> list[int]:
        """Return the tokens of history that a head attends on average, of each row, rounded up."""
        heads = [len(part.heads) for part in self.parts]
        rows = zip(*(cache.lengths for cache in self._caches), strict=True)
        return [math.ceil(sum(map(int.__mul__, row, heads)) / sum(heads)) for row in rows]


def divided_layers(memory: Divided, geometry: Geometry, kind: type[LayerCache]) -> list[LayerCache]:
    """Return the caches of all layers."""
    workspaces: dict[tuple[int, int], Workspace] = {}
    firsts: dict[tuple[int, int], LayerCache] = {}
    layers: list[LayerCache] = []
    for index, parts in enumerate(memory.parts(geometry)):
        caches = []
        for part in parts:
            # One for other heads would be made anew at each turn, and `Workspace.room` is that of one stack.
            room = workspaces.setdefault(part.kind, Workspace())
            caches.append(kind(memory.stacks[part.stack], index, room))
            firsts.setdefault(part.kind, caches[-1])
        layers.append(DividedLayer(memory, index, parts, caches, [firsts[part.kind] for part in parts]))
    return layers
