"""The chunks of an AnyFlow-FAR video: a first, as many of one length as it takes, and a last."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from kvpack.errors import InvalidOptionError, require_int


@dataclass(frozen=True)
class Chunks:
    """Lengths in latent frames.

    Args:
        first: of the first chunk.
        rest: of every other but for the last, which may be shorter.
        partition: all of them, if the call says so.
    """

    first: int
    rest: int
    partition: tuple[int, ...] | None = None

    @classmethod
    def of(cls, partition: Sequence[int], rest: int = 1) -> "Chunks":
        """Return what a partition says; `rest` is that of the model, for a partition of one or two chunks.

        Raises:
            InvalidOptionError: if chunks between the first and the last differ, or one of these is longer.

        >>> Chunks.of([1, 3, 3, 2]).rest, Chunks.of([1, 2], rest=3).rest
        (3, 3)
        """
        if not partition:
            raise InvalidOptionError("chunk_partition is empty; give the latent frames of each chunk, e.g. [1, 3, 3]")
        lengths = tuple(require_int("chunk_partition", each, minimum=1) for each in partition)
        # Two chunks, a first and a last, do not say the others' length.
        inner = set(lengths[1:-1]) or {max(rest, *lengths)}
        if len(inner) > 1 or max(lengths) > max(inner):
            raise InvalidOptionError(
                "kvpack makes chunks of one length, of which the first and the last may be shorter, but "
                f"chunk_partition is {list(lengths)}; e.g. {[1, 3, 3, 2]}"
            )
        return cls(lengths[0], max(inner), lengths)

    def check(self, frames: int | None, given: int = 0) -> None:
        """Compare a call's partition with the latent frames of the video, and with those that it begins with.

        Raises:
            InvalidOptionError: if it has other frames, or those that are given end inside a chunk.
        """
        if self.partition is None:
            return
        shown, wanted = list(self.partition), "no end" if frames is None else f"{frames} latent frames"
        if sum(self.partition) != frames:
            raise InvalidOptionError(
                f"chunk_partition {shown} sums to {sum(self.partition)}, but the video has {wanted}; leave it out and "
                "any length is made of the model's own chunks"
            )
        if given and given not in accumulate(self.partition):
            raise InvalidOptionError(
                f"the video begins with {given} latent frames, which end inside a chunk of chunk_partition {shown}; "
                "leave it out, or let them fill whole chunks"
            )
