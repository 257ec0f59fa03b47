"""The choice of mid blocks by a selector, checked."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvpack.memory.archive import AT_ONCE, Archive
from kvpack.memory.attribution import broken, policy_call
from kvpack.memory.base import Chunk
from kvpack.memory.codec import DENSE
from kvpack.memory.fetching import consecutive_runs
from kvpack.memory.roles import Candidates, Query, Selector
from kvpack.memory.rope import rotate
from kvpack.memory.stack_plan import StackPlan

#: Most blocks that are decoded, or brought from elsewhere, together: at 832x480, 18 MB of keys in bfloat16.
_BROUGHT = 32
#: Blocks from which on a run is read by itself.
_WORTH = 16


def choose(selector: Selector, archive: Archive, chunk: Chunk, plan: StackPlan) -> Int[Tensor, "rows chosen"] | None:
    """Return sorted indices of the chosen mid blocks; None if all are attended or none.

    Raises:
        PolicyError: if the selector returns anything but `[rows, limit]` indices.
    """
    if plan.takes_all:  # nothing to choose, nor to read
        return None
    device, geometry = chunk.queries.device, plan.geometry
    if chunk.shared is not None:  # the first layer's choice, where layers share it
        return chunk.shared.to(device)
    slots, tokens = plan.on(device)
    stored = _keys(archive, plan)

    def seen(mine: Tensor) -> Tensor:
        return mine if selector.by_head else geometry.all_heads(mine)

    queries = seen(chunk.queries)

    def keys(block: int) -> Tensor:
        return seen(stored(block))

    def turned(vectors: Callable[[], Tensor], block: int | None) -> Tensor:
        own = None
        if block is not None and archive.coordinates is not None:
            own = archive.coordinates[:, plan.mid[block].slot, : plan.tokens[block]]
            own = seen(own) if own.ndim == 4 else own
        return rotate(vectors(), plan.absolute_rotations(block, device, own))

    candidates = Candidates(
        first_frames=plan.mid_first_frames,
        frames=plan.mid_frames,
        tokens=tokens,
        # Oldest first: slots are used again, so that their own order is not that of time.
        key_sums=seen(archive.key_sums.index_select(1, slots)),
        keys=keys,
        rotated_keys=lambda block: turned(lambda: keys(block), block),
        # They have this process's heads alone; without them `keys` is asked, which gathers those of all.
        runs=partial(_runs, archive, plan) if selector.by_head or geometry.shard is None else None,
    )
    query = Query(
        queries,
        chunk.layer,
        chunk.index,
        rotated=lambda: turned(lambda: queries, None),
        # A selector that is given all heads has their mean already.
        mean_heads=geometry.mean_heads if selector.by_head else lambda mean: mean,
    )
    with policy_call(selector, "select", plan.ledger.seconds, chunk.layer):
        chosen: Any = selector.select(query, candidates)
    wanted = queries.shape[0], plan.chosen
    if not isinstance(chosen, Tensor) or chosen.dtype not in (torch.int64, torch.int32):
        kind = chosen.dtype if isinstance(chosen, Tensor) else type(chosen).__name__
        raise broken(selector, "select", str(kind), "indices are int64", chunk.layer)
    if tuple(chosen.shape) != wanted:
        raise broken(selector, "select", f"shape {tuple(chosen.shape)}", f"it must be {wanted}", chunk.layer)
    # Back in the order of time (paper, section 5); `check_layers` finds an index twice by its neighbour.
    return chosen.long().sort(dim=1).values


def _keys(archive: Archive, plan: StackPlan) -> Callable[[int], Tensor]:
    """Return what gives one mid block's keys; a codec that computes decodes those behind it too, for who asks next."""
    if archive.codec == DENSE and archive.tier == "device":
        return lambda block: archive.block_keys(plan.mid[block].slot, plan.tokens[block])
    ahead: dict[int, Tensor] = {}

    def keys(block: int) -> Tensor:
        if block not in ahead:
            # Ahead only for who reads in order: else the others would be decoded for nothing.
            in_order = block - 1 in ahead or block == 0
            run = range(block, min(block + (AT_ONCE if in_order else 1), len(plan.mid)))
            ahead.clear()  # before the next are made: two runs are never there at once
            blocks = archive.blocks_keys([plan.mid[each].slot for each in run], plan.ahead)
            ahead.update(zip(run, blocks.unbind(1), strict=True))
        return ahead[block][:, : plan.tokens[block]]

    return keys


def _runs(archive: Archive, plan: StackPlan, most: int) -> Iterator[Float[Tensor, "rows some tokens heads head_dim"]]:
    """Yield keys of at most `most` consecutive mid blocks of one size together."""
    in_place, first = archive.codec == DENSE and archive.tier == "device", 0
    most = most if in_place else min(most, _BROUGHT)
    for tokens, alike in groupby(plan.tokens):
        stop = first + len(list(alike))
        for start in range(first, stop, most):
            slots = [piece.slot for piece in plan.mid[start : min(start + most, stop)]]
            runs = list(consecutive_runs(slots))
            # A ring of slots is two runs, which are views; many short ones are better copied to one place.
            if not in_place or len(slots) < _WORTH * len(runs):
                runs = [(0, len(slots))]
            for begin, end in runs:
                yield archive.blocks_keys(slots[begin:end], plan.ahead)[:, :, :tokens]
        first = stop


def check_choice(selector: Selector, chosen: Tensor | None, count: int, layer: int) -> None:
    """Raise `PolicyError` if a sorted choice is out of range or names a block twice; waits for the device."""
    if chosen is None or not chosen.numel():
        return
    bad = (chosen < 0) | (chosen >= count)
    if bool(bad.any()):
        raise broken(selector, "select", f"index {int(chosen[bad][0])}", f"layer {layer} has {count} candidates")
    if bool((chosen[:, 1:] == chosen[:, :-1]).any()):
        raise broken(selector, "select", "an index twice", "a block is attended once", layer)
