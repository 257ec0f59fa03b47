"""How much of a stack's past an arena must have room for, known before the first chunk."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from kvpack.memory.geometry import Geometry

if TYPE_CHECKING:
    from kvpack.memory.stack import Stack

#: Chunks in which something must repeat, in a period of at most so many, to be taken for settled.
_ALIKE, _PERIOD = 16, 8
#: Chunks behind which a memory that does not settle is said to grow without end.
FAR = 256


def until_settled(chunks: Iterator[Any], most: int, alike: int = _ALIKE) -> list[Any]:
    """Return what is said of each chunk, until it repeats in `alike` of them."""
    seen: list[Any] = []
    for each in islice(chunks, most):
        seen.append(each)
        if period(seen, alike):
            break
    return seen


def period(seen: Sequence[Any], alike: int = _ALIKE) -> int:
    """Return after how many chunks the last `alike` repeat what was before; 0 if they do not."""
    if len(seen) < alike + _PERIOD:  # too few to compare the last with any period
        return 0
    last = seen[-alike:]
    return next((period for period in range(1, _PERIOD + 1) if last == seen[-alike - period : -period]), 0)


def arena_room(stack: "Stack", geometry: Geometry, first: int) -> tuple[int, int]:
    """Return the keys and values that a layer needs room for in the largest chunk of the video, its own included.

    It is 0 if nobody can know: where it grows without end, where rows attend blocks of unequal size, or where a policy
    fails: what is wrong with a later chunk is told when that comes.

    Args:
        stack: the policy.
        geometry: the model, and the length of the video.
        first: latent frames of the first chunk.
    """
    known = None if geometry.frames is None else 1 + max(0, -(-(geometry.frames - first) // stack.chunk_frames))
    try:
        needed = until_settled(_needed(stack, geometry, first), min(known or FAR, FAR))
    except Exception:  # whatever a policy raises
        return 0, 0
    # Not settled within `FAR` chunks, and the video does not end there.
    if None in needed or (len(needed) == FAR and known != FAR):
        return 0, 0
    keys, values = map(max, zip(*needed, strict=True))
    return keys, values


def _needed(stack: "Stack", geometry: Geometry, coming: int) -> Iterator[tuple[int, int] | None]:
    """Yield the keys and values of each chunk after the other; None where rows are gathered apart."""
    book, each = stack.book(), geometry.tokens_per_frame
    decodes_later = stack.start(geometry, 0).archive.decodes_later
    while True:
        plan = stack.plan(book, coming, geometry)
        sizes = {span.tokens for span in plan.attended}
        # Which lengths of blocks `least-selected` keeps depends on what is chosen.
        if not (plan.uniform or plan.takes_all) or (stack.eviction == "least-selected" and len(sizes) > 1):
            yield None
            return
        mid = sum(span.tokens for span in plan.attended[: plan.chosen])
        values = (sum(piece.frames for piece in plan.ledger.whole) + coming) * each + mid
        # Keys that are decoded later have no room: see `Arena.keyless`.
        yield values - (mid if decodes_later and plan.uniform else 0), values
        book, coming = plan.after, stack.chunk_frames
