"""What the demo keeps of each video while it goes by: a few frames, bytes, seconds, and the colours of the walls."""

from dataclasses import dataclass, field
from typing import Any

from kvpack.evaluation.measures import looks
from kvpack.evaluation.observer import Observer
from kvpack.evaluation.tiny import tiny_facts
from kvpack.media.video import Frames
from kvpack.pipeline.track import Track
from kvpack.shipped import FPS

#: How near a wall's colour is to that of its first time, from which on it is the same: those that a wall can have lie
#: at least as far apart as a likeness of 0 says.
SAME = 0.5


@dataclass
class Seen:
    """One video, as far as it is there.

    Args:
        starts: frames that are kept as pictures.
        stills: those frames, by their place in `starts`.
        used: bytes of keys and values that each chunk attends, or that wait in the archive.
        held: bytes that the memory holds behind each chunk, room for later ones among them.
        ends: second of the video at which each chunk ends.
        seconds: processor time that each chunk took, which other programs do not lengthen as they do a clock's.
    """

    starts: list[int]
    stills: dict[int, Frames] = field(default_factory=dict)
    used: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    observer: Observer = field(default_factory=lambda: Observer(tiny_facts()))

    def add(self, track: Track, frames: Frames, seconds: float) -> None:
        """Take what is kept of a chunk that was just made."""
        first = track.frames - len(frames)
        for column, start in enumerate(self.starts):
            if first <= start < track.frames:
                self.stills[column] = frames[start - first].copy()
        self.used.append(track.stats["attended_bytes"] + track.stats["archive_bytes"])
        self.held.append(track.stats["resident_bytes"])
        self.ends.append(track.frames / FPS)
        self.seconds.append(seconds)
        self.observer.add(frames)

    def returns(self) -> list[tuple[float, bool]]:
        """Return when a wall was lit again, and whether it had the colour of its first time."""
        found = looks(self.observer.finish())
        again = [(look.begin / FPS, look.likeness(times[0]) >= SAME) for _, times in found for look in times[1:]]
        return sorted(again)

    def report(self) -> dict[str, Any]:
        """Return plain data, as JSON takes it."""
        again = [[round(second, 2), right] for second, right in self.returns()]
        return {"used_bytes": self.used, "held_bytes": self.held, "walls_lit_again": again}
