"""Bytes between memory and the processor's last cache, in which small buffers stay.

Virtual machines show no hardware counters, so the cache is simulated, in lines of 16 KiB of which the one that was used
longest ago goes first. An operation walks along all of its operands at once. A line that is read and not there is
fetched; one that was written is written back when it goes, or at the end. Freed memory keeps its lines.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from torch import Tensor

from benchmarks.flashdreams import Moved

LINE = 16 * 2**10


class Cached(Moved):
    """Counts bytes between memory and a cache.

    Args:
        size: bytes of the cache.
    """

    def __init__(self, size: int = 8 * 2**20) -> None:
        super().__init__()
        self.most = size // LINE
        #: Lines in the cache, the last used behind the others, and whether each was written.
        self._held: OrderedDict[int, bool] = OrderedDict()

    def count(self, read: list[Tensor], written: list[Tensor]) -> None:
        """Walk along the operands of one operation, so that each is at the same share of its length."""
        walks = [(lines(each), False) for each in read] + [(lines(each), True) for each in written]
        steps = max((len(walk) for walk, _ in walks), default=0)
        places = [0] * len(walks)
        for step in range(1, steps + 1):
            for number, (walk, writes) in enumerate(walks):
                stop = -(-len(walk) * step // steps)
                for line in walk[places[number] : stop]:
                    self._touch(line, writes)
                places[number] = stop

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.nbytes += LINE * sum(self._held.values())
        self._held.clear()

    def _touch(self, line: int, writes: bool) -> None:
        there = line in self._held
        if not there and not writes:
            self.nbytes += LINE
        self._held[line] = writes or self._held.get(line, False)
        self._held.move_to_end(line)
        if not there and len(self._held) > self.most and self._held.popitem(last=False)[1]:
            self.nbytes += LINE


def lines(tensor: Tensor) -> list[int]:
    """Return the lines of a tensor's elements, in order of address."""
    return sorted({line for first, last in _pieces(tensor) for line in range(first // LINE, last // LINE + 1)})


def _pieces(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the first and last byte of parts between which there may be lines of others."""
    if not tensor.numel():
        return
    size = tensor.element_size()
    steps = [(stride * size, axis) for axis, stride in enumerate(tensor.stride()) if tensor.shape[axis] > 1]
    reach = size + sum(step * (tensor.shape[axis] - 1) for step, axis in steps)
    widest, axis = max(steps, default=(0, 0))
    if widest < LINE or reach <= tensor.nbytes:
        yield tensor.data_ptr(), tensor.data_ptr() + reach - 1
        return
    for part in tensor.unbind(axis):
        yield from _pieces(part)
