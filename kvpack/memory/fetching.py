"""How chosen slots of an archive come to the model's device."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from kvpack.memory.codec import Tier
from kvpack.memory.kernels import tried

#: Gives `[chosen, ...]` of `[slots, ...]` and of an index on the device, `[chosen]`.
Select = Callable[[Tensor, Tensor], Tensor]


def selecting(tier: Tier, stored: Sequence[Tensor], device: torch.device) -> Select | None:
    """Return what selects slots without the host; None where the host must know which, for it copies them."""
    if tier == "device":
        return lambda each, index: each.index_select(0, index)
    # Gradients pass through the host's copies, not through the kernel.
    fits = device.type == "cuda" and all(each.is_pinned() and not each.requires_grad for each in stored)
    return _kernel(device) if fits else None


def fetched(stored: Tensor, slots: list[list[int]], device: torch.device) -> Tensor:
    """Return slots of each row, one behind the other, on a device.

    Each is copied from where it lies, which is pinned memory beside CUDA, and nobody waits for it.

    Args:
        stored: `[rows, slots, ...]`.
        slots: those that each row has chosen.
        device: where they are wanted.
    """
    # Row by row, as `archive._flat` lists them for a kernel.
    places = [(row, slot) for row, some in enumerate(slots) for slot in some]
    copies = torch.empty(len(places), *stored.shape[2:], dtype=stored.dtype, device=device)
    for number, (row, slot) in enumerate(places):
        # Slot by slot: an index would first gather on the host, into memory that is not pinned.
        copies[number].copy_(stored[row, slot], non_blocking=True)
    return copies


def in_order(stored: Tensor, slots: Sequence[int], device: torch.device) -> Tensor:
    """Return some slots of `[rows, slots, ...]` on a device; those that lie one behind the other come in one copy.

    Slots that all do, and lie on that device, are a view.
    """
    runs = [stored[:, slots[a] : slots[b - 1] + 1].to(device, non_blocking=True) for a, b in consecutive_runs(slots)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)


def consecutive_runs(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return where runs of slots that lie one behind the other begin and end.

    >>> list(consecutive_runs([4, 5, 0, 1, 2]))
    [(0, 2), (2, 5)]
    """
    # Slots in the order of time are two runs once a full archive has begun to use them again.
    return pairwise([0, *(i for i in range(1, len(slots)) if slots[i] != slots[i - 1] + 1), len(slots)])


@cache
def _kernel(device: torch.device) -> Select | None:
    """Return what reads pinned memory from a GPU; the first time it waits, for bits that must be the same."""

    def launched() -> Select:
        from kvpack.memory.gather_kernel import gather_slots

        # Neither all nor in order, so that a wrong address shows.
        pinned, slots = torch.arange(6.0).view(3, 2).pin_memory(), torch.tensor([2, 0])
        if not torch.equal(gather_slots(pinned, slots.to(device)).cpu(), pinned[slots]):
            raise ValueError("pinned memory is read wrong")
        return gather_slots

    return tried(launched, "chosen blocks are copied by the host,")
