"""Slots of host memory on their way to a GPU while it computes something else."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kvpack.memory.codec import Stored, Tier
from kvpack.memory.fetching import consecutive_runs


def overlaps(tier: Tier, device: torch.device) -> bool:
    """Return whether slots of a tier can come to a device while it computes: CUDA copies pinned memory by itself."""
    return tier == "host" and device.type == "cuda"


class Prefetch:
    """Copies of one layer's slots that were begun before anyone asked for them, on a stream of their own.

    They lie where those of the layer before lay, which the device has read by then.
    """

    def __init__(self) -> None:
        self._rooms: dict[tuple[int, int], Tensor] = {}
        self._owner: object = None
        self._begun: dict[tuple[int, ...], tuple[Stored, torch.cuda.Event]] = {}

    def begin(self, owner: object, stored: Stored, runs: Sequence[Sequence[int]], device: torch.device) -> None:
        """Begin to copy runs of slots; the host does not wait.

        Args:
            owner: whose slots they are.
            stored: pinned tensors `[rows, slots, ...]`.
            runs: slots that will be taken together.
            device: a CUDA device.
        """
        self._owner, self._begun, stream = owner, {}, _stream(device)
        try:
            rooms = [
                tuple(self._room((number, part), each, len(slots), device) for part, each in enumerate(stored))
                for number, slots in enumerate(runs)
            ]
        except torch.OutOfMemoryError:  # then they come when they are asked for
            return
        stream.wait_stream(torch.cuda.current_stream(device))  # it may have yet to write to slots, or to read rooms
        with torch.cuda.stream(stream):
            for slots, parts in zip(runs, rooms, strict=True):
                for room, each in zip(parts, stored, strict=True):
                    _copy(room, each, slots)
                self._begun[tuple(slots)] = parts, stream.record_event()

    def take(self, owner: object, slots: Sequence[int], device: torch.device) -> Stored | None:
        """Return the copies of slots, for which later work of the device waits; None if nobody began them."""
        if owner is not self._owner or tuple(slots) not in self._begun:
            return None
        parts, done = self._begun[tuple(slots)]
        torch.cuda.current_stream(device).wait_event(done)
        return parts

    def _room(self, key: tuple[int, int], stored: Tensor, slots: int, device: torch.device) -> Tensor:
        shape = (stored.shape[0], slots, *stored.shape[2:])
        room = self._rooms.get(key)
        if room is None or room.shape != shape or room.dtype != stored.dtype or room.device != device:
            room = self._rooms[key] = torch.empty(shape, dtype=stored.dtype, device=device)
            room.record_stream(_stream(device))  # which may still write when everyone has let go of it
        return room


def _copy(room: Tensor, stored: Tensor, slots: Sequence[int]) -> None:
    for first, last in consecutive_runs(slots):
        for mine, its in zip(room, stored, strict=True):  # row by row, each of which lies in one piece
            mine[first:last].copy_(its[slots[first] : slots[last - 1] + 1], non_blocking=True)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
