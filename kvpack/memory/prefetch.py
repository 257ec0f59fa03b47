"""Slots of host memory on their way to a GPU while it computes something else."""

from collections.abc import Sequence
from functools import cache

import torch

from kvpack.memory.codec import Stored, Tier
from kvpack.memory.fetching import in_order


def overlaps(tier: Tier, device: torch.device) -> bool:
    """Return whether slots of a tier can come to a device while it computes: CUDA copies pinned memory by itself."""
    return tier == "host" and device.type == "cuda"


class Prefetch:
    """Copies of slots of one archive that were begun before anyone asked for them, on a stream of their own."""

    def __init__(self) -> None:
        self._begun: dict[tuple[int, ...], tuple[Stored, torch.cuda.Event]] = {}

    def begin(self, stored: Stored, runs: Sequence[Sequence[int]], device: torch.device) -> None:
        """Begin to copy runs of slots; the host does not wait.

        Args:
            stored: pinned tensors `[rows, slots, ...]`.
            runs: slots that will be taken together.
            device: a CUDA device.
        """
        if not runs:
            return
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # which may have yet to write some of them
        for slots in runs:
            with torch.cuda.stream(stream):
                try:
                    parts = tuple(in_order(each, slots, device) for each in stored)
                except torch.OutOfMemoryError:  # they come later, when something else is let go of
                    return
                self._begun[tuple(slots)] = parts, stream.record_event()

    def take(self, slots: Sequence[int], device: torch.device) -> Stored | None:
        """Return the copies of slots, for which later work of the device waits; None if nobody began them."""
        if tuple(slots) not in self._begun:
            return None
        parts, done = self._begun.pop(tuple(slots))
        stream = torch.cuda.current_stream(device)
        stream.wait_event(done)
        for each in parts:
            each.record_stream(stream)  # they were allocated for the other one
        return parts

    def drop(self, device: torch.device) -> None:
        """Let go of what was begun; later work of the device comes behind it, and may write to those slots."""
        for slots in list(self._begun):
            self.take(slots, device)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
