"""Which block leaves an archive that is full."""

from collections.abc import Sequence
from typing import Literal

Eviction = Literal["oldest", "spread"]


def evicted(first_frames: Sequence[int], history: int, rule: Eviction) -> int:
    """Return the index of the block that goes.

    "oldest" forgets what is longest ago. "spread" thins out: of all blocks but the first and the last, that one goes
    whose neighbours are nearest to each other for its age. The archive then reaches back to the beginning, and blocks
    lie the denser the newer they are; of fewer than three the oldest goes. Neither depends on what was seen, so that
    all layers and rows keep the same.

    Args:
        first_frames: of each block, ascending.
        history: frames of all history.
        rule: of the two.

    >>> evicted([8, 12, 16, 20, 24, 28], 36, "oldest"), evicted([8, 12, 16, 20, 24, 28], 36, "spread")
    (0, 1)
    """
    if rule == "oldest" or len(first_frames) < 3:
        return 0
    return min(
        range(1, len(first_frames) - 1),
        key=lambda i: (first_frames[i + 1] - first_frames[i - 1]) / (history - first_frames[i]),
    )
