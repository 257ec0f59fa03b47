"""How an archive grows, and what becomes of one that is full: which block leaves it, or which two become one."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kvpack.memory.ledger import BlockEntry

Eviction = Literal["oldest", "spread", "least-selected", "merged"]


def evicted(blocks: Sequence["BlockEntry"], history: int, rule: Eviction) -> int:
    """Return the index of the block that goes.

    "oldest" forgets what is longest ago. "spread" thins out: of all blocks but the first and the last, that one goes
    whose neighbours are nearest to each other for its age. The archive then reaches back to the beginning, and blocks
    lie the denser the newer they are; of fewer than three the oldest goes. "least-selected" forgets the block that the
    smallest share of layers and rows had chosen before this chunk, since it was there to be chosen; a block that never
    was stays. All rows keep the same blocks, so that what a row forgets depends on the others. Where "merged" finds no
    two blocks to merge, the oldest goes.

    Args:
        blocks: the archive, oldest first, behind it those on their way into it.
        history: frames of all history.
        rule: of these.

    >>> from kvpack.memory.ledger import BlockEntry
    >>> blocks = [BlockEntry(first, 4, offered=6, chosen=28 - first) for first in (8, 12, 16, 20, 24, 28)]
    >>> [evicted(blocks, 36, rule) for rule in ("oldest", "spread", "least-selected")]
    [0, 1, 5]
    """
    if rule == "spread" and len(blocks) > 2:
        return min(
            range(1, len(blocks) - 1),
            key=lambda i: (blocks[i + 1].first_frame - blocks[i - 1].first_frame) / (history - blocks[i].first_frame),
        )
    # One that was never offered has no share, and must not go before anybody could choose it.
    seen = [index for index, block in enumerate(blocks) if block.offered]
    if rule == "least-selected" and seen:
        return min(seen, key=lambda i: blocks[i].chosen / blocks[i].offered)
    return 0


def merging(blocks: Sequence["BlockEntry"], history: int) -> int | None:
    """Return the index of the archived block that becomes one with the next; None if no two can.

    Of two neighbours that are blocks of one length, or means of such, those that are shortest together for their age:
    the older, the more of the video a block stands for.

    Args:
        blocks: as those of `evicted`; those on their way have no slot yet, and are left alone.
        history: frames of all history.

    >>> from kvpack.memory.ledger import BlockEntry
    >>> merging([BlockEntry(8, 8, slot=0, blocks=2), BlockEntry(16, 4, slot=1), BlockEntry(20, 4, slot=2)], 40)
    1
    """
    pairs = [
        i
        for i, (one, two) in enumerate(pairwise(blocks))
        if one.stop == two.first_frame and one.block_frames == two.block_frames and min(one.slot, two.slot) >= 0
    ]
    return min(
        pairs,
        key=lambda i: (blocks[i + 1].stop - blocks[i].first_frame) / (history - blocks[i].first_frame),
        default=None,
    )


def grown_slots(slots: int, slot: int, most: int | None) -> int:
    """Return how many slots an archive of `slots` gets for a block in `slot`, while nobody knows how many will come.

    To grow copies all of it, and a device's allocator keeps what was left, too small for the next size: one slot at a
    time, that is many times the archive. So it grows by half, but at most by 32 slots, or a thirtieth.

    Args:
        slots: what it has.
        slot: index of the block's.
        most: slots of a full archive; None if it is never full.

    >>> grown_slots(0, 0, None), grown_slots(4, 3, None), grown_slots(4, 4, None), grown_slots(94, 94, None)
    (1, 4, 6, 126)
    >>> grown_slots(94, 94, 101)
    101
    """
    if slot < slots:
        return slots
    larger = slots + max(min(slots // 2, 32), slots // 32)
    return max(slot + 1, larger if most is None else min(larger, most))
