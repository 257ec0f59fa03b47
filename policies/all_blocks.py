"""Attend every archived block."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from kvpack.memory.roles import Candidates, Query, Selector, as_indices


@dataclass(frozen=True)
class AllSelector(Selector):
    """Chooses all blocks; memory and time grow with the video.

    >>> AllSelector().limit(7)
    7
    """

    name = "all"
    by_head = True

    def limit(self, candidates: int) -> int:
        """Return the number of all blocks."""
        return candidates

    def select(self, query: Query, candidates: Candidates) -> Int[Tensor, "batch chosen"]:
        """Return every index."""
        return as_indices(range(candidates.count), query.queries.shape[0], query.queries.device)
