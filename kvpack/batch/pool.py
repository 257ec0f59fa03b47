"""A batch over workers of Ray, each of which may end at any time.

A worker is an actor. Where its process or machine ends another one is started, and its video goes on from the last
checkpoint, on whichever worker is free first.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from kvpack.batch.cluster import Actor, cores
from kvpack.batch.folder import BatchFolder
from kvpack.batch.videos import Settings, Video
from kvpack.errors import InvalidOptionError, first_line


@dataclass
class Attempt:
    """How a video fares.

    Args:
        video: which one.
        begun: times that it was begun or gone on with.
        lost: times that its worker was lost before it reached another checkpoint.
        chunks: that were made since it was begun or gone on with.
    """

    video: Video
    begun: int = 0
    lost: int = 0
    chunks: int = 0


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Args:
        kind: "frames", "lost", "made" or "failed".
        video: which video it is about.
        process: of its worker.
        frames: pixel frames that it has.
        said: why it was lost or has failed.
    """

    kind: str
    video: Video
    process: int
    frames: int = 0
    said: str = ""


#: What a program may be told while a batch is made.
OnEvent = Callable[[Event], None]


class Pool:
    """Workers of a connected `ray`, and the videos that they make.

    A video is gone on with at most `retries` times from one and the same checkpoint.
    """

    def __init__(
        self,
        ray: Any,
        settings: Settings,
        folder: BatchFolder,
        videos: Sequence[Video],
        workers: int,
        retries: int,
        on_event: OnEvent,
    ) -> None:
        self.ray, self.folder, self.retries, self.on_event = ray, folder, retries, on_event
        self.every, self.waiting = settings.every, deque(map(Attempt, videos))
        workers = min(workers, len(videos))  # one without a video would load the model in vain
        gpu = settings.device.partition(":")[0] == "cuda"
        # Ray gives a process as many threads as it has cores here, unless OMP_NUM_THREADS says otherwise.
        needs = {"num_cpus": 1, "num_gpus": 1} if gpu else {"num_cpus": max(1, cores() // max(workers, 1))}
        # Another actor takes the place of one that is lost: Ray refuses calls of one that it restarts itself.
        actor = ray.remote(max_restarts=0, max_task_retries=0, **needs)(Actor)
        self.spawn = partial(actor.remote, asdict(settings), str(folder.path))
        #: What is waited for: workers that load the pipeline, and how many were lost at it in a row; videos in work.
        self.starting: dict[Any, tuple[Any, int]] = {}
        for _ in range(workers):
            self._start()
        self.making: dict[Any, tuple[Any, int, Attempt]] = {}
        #: Why a worker was lost last while it loaded the pipeline.
        self.ended = ""

    def run(self) -> None:
        """Make all videos; each has its line in the manifest as soon as it is made, or has failed.

        Raises:
            InvalidOptionError: if the pipeline does not load.
        """
        while self.waiting or self.making:
            if not self.starting and not self.making:
                said = f"each ended several times while it loaded the pipeline, at last: {self.ended}"
                raise InvalidOptionError(f"no worker is left: {said}")
            for ready in self.ray.wait([*self.starting, *self.making])[0]:
                self._started(ready) if ready in self.starting else self._heard(ready)

    def _start(self, lost: int = 0) -> None:
        worker = self.spawn()
        self.starting[worker.start.remote()] = worker, lost

    def _started(self, ready: Any) -> None:
        worker, lost = self.starting.pop(ready)
        try:
            process, wrong = self.ray.get(ready)
        except self.ray.exceptions.RayError as error:
            self.ended = _why(error)
            if lost < self.retries:
                self._start(lost + 1)
            return
        if wrong is not None:
            raise InvalidOptionError(wrong)
        self._next(worker, process)

    def _next(self, worker: Any, process: int) -> None:
        """Give a worker the next video, if there is one."""
        if self.waiting:
            attempt = self.waiting.popleft()
            attempt.begun, attempt.chunks = attempt.begun + 1, -1  # before the first one it says what it has
            # A generator, so that frames are told of while it is made.
            stream = worker.make.options(num_returns="streaming").remote(asdict(attempt.video))
            self.making[stream] = worker, process, attempt

    def _heard(self, stream: Any) -> None:
        worker, process, attempt = self.making[stream]
        try:
            said = self.ray.get(next(stream))
        except (self.ray.exceptions.RayError, StopIteration) as error:
            self._lost(stream, error)
            return
        if "entry" in said:
            del self.making[stream]
            self._ended(attempt, process, said["entry"])
            self._next(worker, process)
            return
        attempt.chunks += 1
        self.on_event(Event("frames", attempt.video, process, said["frames"]))

    def _lost(self, stream: Any, error: Exception) -> None:
        """Go on with the video elsewhere, and start another worker."""
        worker, process, attempt = self.making.pop(stream)
        why = _why(error)
        if isinstance(error, self.ray.exceptions.RayTaskError):  # its process lives, but may have spoiled its GPU
            self.ray.kill(worker)
        self._start()
        attempt.lost = 0 if attempt.chunks >= self.every else attempt.lost + 1  # it got as far as another checkpoint
        if attempt.lost > self.retries:
            why = f"its worker ended {attempt.lost} times behind one and the same checkpoint, at last: {why}"
            self._ended(attempt, process, {"name": attempt.video.name, "error": why})
            return
        self.waiting.appendleft(attempt)  # first, since the most of it may be made already
        self.on_event(Event("lost", attempt.video, process, said=why))

    def _ended(self, attempt: Attempt, process: int, entry: dict[str, Any]) -> None:
        self.folder.note({**entry, "begun": attempt.begun})
        kind = "failed" if "error" in entry else "made"
        self.on_event(Event(kind, attempt.video, process, entry.get("frames", 0), entry.get("error", "")))


def _why(error: Exception) -> str:
    """Return in one line why a worker was lost: what was raised in it, where Ray says that."""
    return first_line(getattr(error, "cause", None) or error)
