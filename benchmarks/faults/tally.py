"""Counts of what came of each kind of fault."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.report import Bar, Row

BARS = (
    Bar("every fault is survived", "", "lost", 0, timed=False),
    Bar("every resumed generation is bit-identical", "", "other bits", 0, timed=False),
)


@dataclass
class Tally:
    """What came of one kind of fault."""

    tried: int = 0
    survived: int = 0
    resumed: int = 0
    identical: int = 0

    def rows(self, subject: str) -> list[Row]:
        """Counts, and what they lack."""
        lost, other = self.tried - self.survived, self.resumed - self.identical
        counts = {
            "tried": self.tried,
            "survived": self.survived,
            "resumed": self.resumed,
            "bit-identical": self.identical,
        }
        counts |= {"lost": lost, "other bits": other}
        return [Row(subject, name, count, count, count, "faults", max(1, self.tried)) for name, count in counts.items()]
