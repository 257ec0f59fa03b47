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
    """Copies of one layer's slots that were begun before it asks for them, on a stream of their own.

    What the layer before has asked for is begun. Rooms are used again: the stream waits until the device has read them.
    """

    def __init__(self) -> None:
        #: Runs of slots that were asked for since the last copies were begun.
        self._asked: dict[tuple[int, ...], None] = {}
        self._rooms: dict[tuple[int, int], Tensor] = {}
        self._owner: object = None
        self._begun: dict[tuple[int, ...], tuple[Stored, torch.cuda.Event]] = {}
        self._given_up = False

    def begin(self, owner: object, stored: Stored, device: torch.device) -> None:
        """Begin to copy what was asked for last, of another layer; the host does not wait.

        Args:
            owner: whose slots they are.
            stored: pinned tensors `[rows, slots, ...]`.
            device: a CUDA device.
        """
        # Copies of before are those of a layer that has read them.
        runs, self._asked, self._owner, self._begun = tuple(self._asked), {}, owner, {}
        if self._given_up or not runs:
            return
        try:
            rooms = [
                tuple(self._room((number, part), each, len(slots), device) for part, each in enumerate(stored))
                for number, slots in enumerate(runs)
            ]
        except torch.OutOfMemoryError:  # the model needs what is left, and keys come when they are asked for
            self.drop()
            self._given_up = True  # until the chunk ends, and its plan with this
            return
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # it may have yet to write to slots, or to read rooms
        with torch.cuda.stream(stream):
            for slots, parts in zip(runs, rooms, strict=True):
                for room, each in zip(parts, stored, strict=True):
                    _copy(room, each, slots)
                done = torch.cuda.Event()
                done.record(stream)
                self._begun[slots] = parts, done

    def take(self, owner: object, slots: Sequence[int], device: torch.device) -> Stored | None:
        """Return the copies of slots, for which later work of the device waits; None if nobody began them."""
        self._asked[tuple(slots)] = None  # also if it was found: the next layer will ask for it
        if owner is not self._owner or tuple(slots) not in self._begun:  # another layer's slots have the same numbers
            return None
        parts, done = self._begun[tuple(slots)]
        torch.cuda.current_stream(device).wait_event(done)  # on the device: the host goes on
        return parts

    def drop(self) -> None:
        """Let go of all copies and of the rooms for more."""
        self._rooms, self._begun = {}, {}

    def _room(self, key: tuple[int, int], stored: Tensor, slots: int, device: torch.device) -> Tensor:
        shape = (stored.shape[0], slots, *stored.shape[2:])
        room = self._rooms.get(key)  # by the run's number: layers ask alike, so that rooms fit again
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
