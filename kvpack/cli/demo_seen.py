"""What the demo keeps of its videos: of each while it goes by, and the ends over several seeds.

Those ends are made here, or were kept with the package, since that takes minutes.
"""

import json
from contextlib import closing
from dataclasses import dataclass, field
from importlib import resources
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from kvpack.evaluation.measures import looks, subject_likeness
from kvpack.evaluation.observer import Observer
from kvpack.evaluation.tiny import SIZE, tiny_facts
from kvpack.media.video import Frames, as_bytes
from kvpack.memory.base import Memory
from kvpack.pipeline.enable import enable
from kvpack.pipeline.track import Track
from kvpack.shipped import CALL, FPS

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


@dataclass(frozen=True)
class Ends:
    """The ends of a memory's videos.

    Args:
        pictures: last frame of each seed, `[height, width, 3]`.
        likeness: how alike the subject of the last five seconds is to that of the first, in 0..1.
    """

    pictures: list[Frames]
    likeness: list[float]


@dataclass(frozen=True)
class Kept:
    """What is kept with the package, of one prompt.

    Args:
        stacks: the memories as they were, by name.
        ends: by the name of the memory; "truth" are videos that were drawn by the rules of the world.
        truth: frames of one such video, evenly over its length.
    """

    prompt: str
    seconds: int
    steps: int
    stacks: dict[str, Any]
    ends: dict[str, Ends]
    truth: list[Frames]

    def of(self, name: str, stack: Memory) -> bool:
        """Say whether what is kept under a name was made by this memory; options that came later were as they are."""
        now, then = json.loads(json.dumps(stack.to_dict())), self.stacks.get(name)
        return then is not None and {**now, **then} == now


def kept() -> Kept | None:
    """Return what is kept, or None where a package was made without."""
    folder = resources.files("kvpack") / "data" / "demo"
    if not (folder / "demo.json").is_file():
        return None
    told = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    ends, truth = (_tiles((folder / name).read_bytes()) for name in ("ends.png", "truth.png"))
    found = {name: Ends(row, told["likeness"][name]) for name, row in zip(told["likeness"], ends, strict=True)}
    return Kept(told["prompt"], told["seconds"], told["steps"], told["stacks"], found, truth[0])


def made(pipeline: Any, stack: Memory, prompt: str, seeds: int, frames: int, steps: int) -> Ends:
    """Make videos of `frames` pixel frames with the seeds from 0 on together, and return their ends."""
    enable(pipeline, stack)
    observers = [Observer(tiny_facts()) for _ in range(seeds)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    call = {**CALL, "num_inference_steps": steps, "num_frames": frames, "generator": generators}
    last: list[Frames] = []
    with closing(pipeline.packforcing.stream(prompt=[prompt] * seeds, output_type="np", **call)) as stream:
        for chunk in stream:
            videos = as_bytes(chunk)
            last = [video[-1] for video in videos]
            for observer, video in zip(observers, videos, strict=True):
                observer.add(video)
    return Ends(last, [alike(observer) for observer in observers])


def alike(observer: Observer) -> float:
    """Return how alike the subject of the last five seconds is to that of the first: shape, size and colour."""
    return round(float(subject_likeness(observer.finish())[-5 * FPS :].mean()), 3)


def _tiles(data: bytes) -> list[list[Frames]]:
    """Return rows of frames that stand in a PNG with nothing between, as `benchmarks/demo.py` puts them there."""
    whole = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    rows = [whole[top : top + SIZE] for top in range(0, whole.shape[0], SIZE)]
    return [[row[:, left : left + SIZE] for left in range(0, whole.shape[1], SIZE)] for row in rows]
