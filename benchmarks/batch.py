"""What workers that are killed cost a batch: 40 prompts over 3 workers of Ray, of which one is killed every 20 seconds.

On the shipped pipeline, saved behind every second chunk. Each video is compared, byte by byte, with that of a pipeline
of its own that nothing interrupts. "chunks made again" are those behind the last checkpoint of a worker that was
killed, as a part of all chunks of the batch; low and high are the same.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter

from benchmarks.report import SEED, Bar, Row, samples, say, script
from kvpack.batch.cluster import cluster
from kvpack.batch.folder import BatchFolder
from kvpack.batch.pool import Event, Pool
from kvpack.batch.videos import Settings, Video
from kvpack.batch.work import Work
from kvpack.shipped import CALL, FPS, STACK_OPTIONS, TRAINING, shipped_folder

WORKERS, PERIOD, EVERY, STEPS = 3, 20.0, 2, 6
COLOURS = ("red", "green", "blue", "yellow", "magenta")
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = ("night stripes", "dark checks", "dusk rings", "plain slate")
BARS = (Bar("no video differs from a single run", "", "videos that differ", 0, timed=False),)


class Killer(threading.Thread):
    """Kills one of the workers that make a video, again and again.

    Args:
        period: seconds between two.
    """

    def __init__(self, period: float) -> None:
        super().__init__(daemon=True)
        self.period, self.ended, self.draw = period, threading.Event(), random.Random(SEED)
        self.working: dict[int, str] = {}
        self.events: list[Event] = []
        self.killed = 0

    def hear(self, event: Event) -> None:
        """Note who works."""
        self.events.append(event)
        self.working.pop(event.process, None)
        if event.kind == "frames":
            self.working[event.process] = event.video.name

    def run(self) -> None:
        while not self.ended.wait(self.period):
            if working := list(self.working):
                chosen = self.draw.choice(working)
                say(f"batch: {self.working.pop(chosen)} loses its worker")
                os.kill(chosen, signal.SIGKILL)
                self.killed += 1


def videos(count: int, seconds: float) -> list[Video]:
    """Prompts that the shipped pipeline knows."""
    every = [f"a {a} {b} bouncing over {c}" for a in COLOURS for b in SHAPES for c in BACKGROUNDS]
    chosen = random.Random(SEED).sample(every, count)
    return [Video(f"{index:04d}", prompt, index, seconds) for index, prompt in enumerate(chosen, 1)]


def run(small: bool = False) -> list[Row]:
    """Videos of a batch that loses workers, beside those of single runs."""
    count, seconds, workers, period = (4, 8.0, 2, 1.0) if small else (40, 4.0, WORKERS, PERIOD)
    wanted = videos(count, seconds)
    call = {**CALL, "num_inference_steps": STEPS}
    options = {**TRAINING, **STACK_OPTIONS["packforcing"]}
    settings = Settings(str(shipped_folder()), "packforcing", FPS, 4, EVERY, "float32", "cpu", options, call)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        alone, batch = (BatchFolder(Path(folder) / name) for name in ("alone", "batch"))
        singly(settings, alone, wanted)
        batch.ask(settings, wanted)
        killer, start = Killer(period), perf_counter()
        with cluster(None, workers) as ray:
            killer.start()
            Pool(ray, settings, batch, wanted, workers, 5, killer.hear).run()
            killer.ended.set()
        seconds = perf_counter() - start
        made = batch.made()
        differ = [each for each in wanted if not same(alone.output(each), batch.output(each))]
    subject = f"{count} videos over {workers} workers, one killed every {period:g} s"
    return [
        samples(subject, "videos that differ from single runs", [len(differ)], "videos"),
        samples(subject, "workers killed", [killer.killed], "workers"),
        samples(subject, "videos gone on with", [sum(entry["begun"] > 1 for entry in made.values())], "videos"),
        samples(subject, "times that a video was begun", [entry["begun"] for entry in made.values()], "times"),
        samples(subject, "chunks made again", [made_again(killer.events)], "ratio"),
        samples(subject, "time of the batch", [seconds], "s"),
    ]


def singly(settings: Settings, folder: BatchFolder, wanted: Sequence[Video]) -> None:
    """Make each video by a pipeline that is loaded for it."""
    folder.ask(settings, wanted)
    for video in wanted:
        say(f"batch: {video.name} alone")
        for _ in Work(settings, folder).make(video):
            pass


def same(path: Path, other: Path) -> bool:
    return path.read_bytes() == other.read_bytes()


def made_again(events: Sequence[Event]) -> float:
    """Chunks that were made more than once, as a part of those that the videos have."""
    made: dict[str, list[int]] = {}
    for event in events:
        if event.kind == "frames":
            made.setdefault(event.video.name, []).append(event.frames)
    # The first word of each time that a video is begun is what it has; a chunk follows where that grows.
    chunks = [(name, b) for name, frames in made.items() for a, b in pairwise(frames) if b > a]
    return len(chunks) / len(set(chunks)) - 1


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    script("batch", __doc__ or "", run, BARS)
