"""What one visitor of the page watches: one video or two side by side, and what is asked of them meanwhile."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from kvpack.cli.ui.model import Model
from kvpack.cli.ui.video import Video
from kvpack.errors import InvalidOptionError, SnapshotError, require_seed
from kvpack.media.files import make_folder, save_bytes

#: Seconds of video that are made ahead of what is watched, so that a new prompt is soon seen.
AHEAD = 2.0
_ABOUT = "page.json"


@dataclass(eq=False)
class Studio:
    """One video, or two that are made together, one chunk at a time, the one that is behind first.

    Args:
        paused: whether nothing is made for the moment.
        name: of this showing, by which the page knows that another one began.
    """

    model: Model
    videos: list[Video]
    paused: bool = False
    closed: bool = False
    name: str = field(default_factory=lambda: uuid4().hex)
    _turn: int = 0
    _wanted: dict[int, tuple[str | None, bool]] = field(default_factory=dict)

    @property
    def made(self) -> float:
        """Seconds that all videos have."""
        return min(video.made for video in self.videos)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to make."""
        return self.closed or all(video.ended for video in self.videos)

    def say(self, prompt: str | None, cut: bool = False) -> None:
        """Ask for another prompt, or another scene, from the next chunk on; a cut asked for before it still holds."""
        for video in self.videos:
            before = self._wanted.pop(id(video), (None, False))  # or a chunk that begins meanwhile takes it as well
            self._wanted[id(video)] = (before[0] if prompt is None else prompt, cut or before[1])

    def advance(self) -> bool:
        """Make one chunk of the video that is behind; return whether there was one to make."""
        with self.model.lock:
            waiting = [video for video in self.videos if not video.ended]
            if self.closed or not waiting:
                return False
            video = min(waiting, key=lambda each: each.frames)
            return video.advance(*self._wanted.pop(id(video), (None, False))) or not self.ended

    def chunks(self, live: bool) -> Iterator[None]:
        """Make chunks until the end, a pause or `close`; live, none much before it is watched."""
        self._turn += 1
        mine, began, before = self._turn, time.monotonic(), self.made

        def on() -> bool:
            return not (self.paused or self.closed) and mine == self._turn  # who was asked last goes on

        while on() and self.advance():
            yield
            while live and on():
                early = self.made - before - AHEAD - (time.monotonic() - began)
                if early <= 0:
                    break
                time.sleep(min(early, 0.05))

    def save(self, folder: Path) -> None:
        """Write all that the videos remember into a folder.

        Raises:
            KVPackError: if it cannot be written, or holds something else.
        """
        with self.model.lock:
            if not any(video.seconds for video in self.videos):
                raise SnapshotError("nothing is made yet; start a video first")
            make_folder(folder)
            for number, video in enumerate(self.videos):
                video.stream.save(folder / str(number), {"label": video.label, "frames": video.frames})
            told = {"videos": len(self.videos), "prompts": [video.prompts for video in self.videos]}
            save_bytes(json.dumps(told, indent=2).encode(), folder / _ABOUT)

    @classmethod
    def resume(cls, model: Model, folder: Path) -> "Studio":
        """Go on with the videos of a folder.

        Raises:
            SnapshotError: if it holds none, or those of another model.
        """
        try:
            told = json.loads((folder / _ABOUT).read_bytes())
            prompts = [[(float(second), str(text)) for second, text in each] for each in told["prompts"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SnapshotError(f"{folder} holds no video that was saved by this page") from error
        with model.lock:
            videos = [model.resume(folder / str(number)) for number in range(len(prompts))]
        for video, each in zip(videos, prompts, strict=True):
            video.prompts = each
        return cls(model, videos)

    def fork(self, seed: int, prompt: str | None) -> "Studio":
        """Put another future of the video beside it.

        Raises:
            InvalidOptionError: if two are shown already, or the seed has more than 64 bits; they go on then.
        """
        if len(self.videos) != 1:
            raise InvalidOptionError("two videos are shown already; fork one that is alone")
        require_seed(seed)
        self.paused = True  # or chunk after chunk takes the lock first
        with self.model.lock:
            (video,) = self.videos
            other = self.model.fork(video, seed, prompt)
            other.prompts = [*video.prompts, *([(video.made, prompt)] if prompt else [])]
            self.videos = [video, other]
        return self

    def close(self) -> None:
        """End the videos, and free what they hold."""
        self.closed = True
        with self.model.lock:
            for video in self.videos:
                video.stream.close()
                video.trace.unlink(missing_ok=True)


def saved_name(text: str) -> str:
    """Return the name of a saved video, which is a folder's.

    Raises:
        InvalidOptionError: if it could be another place.

    >>> saved_name(" my video ")
    'my video'
    """
    name = text.strip()
    if re.fullmatch(r"[\w-][\w -]{0,59}", name) is None:
        raise InvalidOptionError(f"a name has letters, digits, spaces and dashes, e.g. my-video, got {text!r}")
    return name


def saved_names(folder: Path) -> list[str]:
    """Return the names of the videos that are saved in a folder."""
    return sorted(each.parent.name for each in folder.glob(f"*/{_ABOUT}"))
