"""What only compressed history can know: how right a look is when it returns that no whole frame still shows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kvpack.errors import require_int
from kvpack.evaluation.facts import Mask
from kvpack.evaluation.measures import looks
from kvpack.evaluation.observation import Observation

#: Returns by where the look is held: in the first frames, in the last ones, or in neither.
RECALL = ("recall", "returns_from_sink", "returns_from_recent")
Source = Literal["recall", "returns_from_sink", "returns_from_recent"]


@dataclass(frozen=True)
class WholeFrames:
    """Pixel frames that a memory keeps whole; what is shown in none of them is known by compressed history alone.

    Args:
        first: of the video; 29 are the 8 latent frames of `packforcing`'s sink.
        last: before a return; 32 are its 4 recent latent frames and the 4 that are generated.

    Raises:
        InvalidOptionError: if a number is negative.

    >>> import numpy as np
    >>> on = np.arange(99) == 40
    >>> [WholeFrames().source(begin, on) for begin in (72, 73)], WholeFrames(first=41).source(73, on)
    (['returns_from_recent', 'recall'], 'returns_from_sink')
    """

    first: int = 29
    last: int = 32

    def __post_init__(self) -> None:
        require_int("first", self.first)
        require_int("last", self.last)

    def source(self, begin: int, on: Mask) -> Source:
        """Return where a look is held that returns at frame `begin` and was on before in some frames, be it in one."""
        if on[max(0, begin - self.last) : begin].any():
            return "returns_from_recent"
        return "returns_from_sink" if on[: min(begin, self.first)].any() else "recall"


def recall(
    observation: Observation, begin: int, end: int, whole: WholeFrames | None = None
) -> dict[str, tuple[float, ...]]:
    """Return the score in 0..1 of every return from frame `begin` up to `end`, by where its look is held.

    A score is how near the look is to that of its first time. The mean over "recall" is what a memory remembers by
    compressed history: 1 at most, and, where a look is guessed, chance.

    `whole` are the frames that the memory keeps whole; those of `packforcing` if None, so that other memories, whatever
    they keep, answer the same question.
    """
    found: Mapping[str, list[float]] = {name: [] for name in RECALL}
    for on, times in looks(observation):
        for look in times[1:]:
            if begin <= look.begin < end:
                found[(whole or WholeFrames()).source(look.begin, on)].append(look.likeness(times[0]))
    return {name: tuple(scores) for name, scores in found.items()}
