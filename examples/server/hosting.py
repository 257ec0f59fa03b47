"""Several generations on one pipeline: one thread computes chunks in turn, and who is idle makes room on the disk."""

import ctypes
import shutil
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvpack.media.files import whole_file
from kvpack.memory.costs import channels_of
from kvpack.pipeline.enable import enable
from kvpack.pipeline.track import load_pipeline
from kvpack.planning.presets import timing
from kvpack.planning.resident import most_resident
from kvpack.snapshots.folder import SnapshotFolder

SAVE_EVERY = 8  # chunks that may have to be made again after SIGKILL


class FullError(Exception):
    """All memory is taken by sessions that are not idle."""


class GoneError(Exception):
    """There is no such session, or it was cancelled."""


class WrongChunkError(Exception):
    """A chunk is neither the next nor the last one made."""


@dataclass
class User:
    """One session.

    Args:
        name: of the session, and of its folder.
        chunks: made so far.
        stream: the generation; None while it is on the disk.
        prompt: what the next chunk changes to, and whether the scene does; None goes on as it was.
        last: frames of the last chunk, for a client that lost the answer; in a file while the stream is.
        held: bytes that its memory held behind the last chunk.
        used: when a chunk was last asked for or made.
        waiting: chunks asked for that are not made.
        cancelled: whether it is to end.
    """

    name: str
    chunks: int = 0
    stream: Any = None
    prompt: tuple[str | None, bool] | None = None
    last: Any = None
    held: int = 0
    used: float = 0.0
    waiting: set[object] = field(default_factory=set)
    cancelled: bool = False


class Host:
    """Users of one pipeline; all that touches it runs in one thread, first come, first served.

    Args:
        model: folder of the pipeline.
        folder: sessions are saved here, and found again.
        budget: bytes for what the sessions remember.
        idle_seconds: a session may be moved to the disk when nobody has asked for a chunk of it for so long.
        device: of the model.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        budget: float,
        idle_seconds: float = 10,
        device: str = "cpu",
    ) -> None:
        self.folder, self.idle_seconds = folder, idle_seconds
        self.pipeline = enable(load_pipeline(model, torch.float32 if device == "cpu" else torch.bfloat16, device))
        self.pipeline.set_progress_bar_config(disable=True)
        self.fps = self.pipeline.packforcing.fps
        self.session_bytes = session_bytes(self.pipeline, model)
        self.capacity = int(budget // self.session_bytes)
        if self.capacity < 1:
            raise ValueError(f"budget must be at least {self.session_bytes} bytes, one session, got {budget:g}")
        folder.mkdir(parents=True, exist_ok=True)
        found = {each.name: _saved_chunks(each) for each in folder.iterdir()}
        self.users = {name: User(name, chunks) for name, chunks in found.items() if chunks >= 0}
        self.stopping = False
        self._worker = ThreadPoolExecutor(1, "kvpack")
        self._measure()

    def _measure(self) -> None:
        self.metrics = CollectorRegistry()
        here: dict[str, Any] = {"registry": self.metrics}
        Gauge("kvpack_sessions", "Sessions, on the disk or not", **here).set_function(lambda: len(self.users))
        Gauge("kvpack_sessions_in_memory", "Sessions in memory", **here).set_function(self._resident)
        Gauge("kvpack_held_bytes", "What sessions in memory remember", **here).set_function(self._held)
        Gauge("kvpack_sessions_capacity", "Sessions that fit the budget", **here).set(self.capacity)
        self.made = Counter("kvpack_chunks", "Chunks made", **here)
        self.moved = Counter("kvpack_moves", "Sessions moved", ["to"], **here)
        self.waited = Histogram("kvpack_wait_seconds", "From asking for a chunk to its turn", **here)
        self.took = Histogram("kvpack_chunk_seconds", "A chunk's turn, with the way from and to the disk", **here)

    def user(self, name: str) -> User:
        """Return a session, or raise `GoneError`."""
        user = self.users.get(name)
        if user is None or user.cancelled:
            raise GoneError(f"no session {name!r}; POST /sessions begins one")
        return user

    def begin(self, prompt: str, seed: int) -> Future[str]:
        """Begin a session, whose name the future brings, or `FullError`."""
        return self._worker.submit(self._begin, prompt, seed)

    def chunk(self, name: str, number: int | None = None) -> Future[tuple[int, Any]]:
        """Make a session's next chunk; the future brings its number and frames `[frames, height, width, 3]`, bytes.

        Args:
            name: of the session.
            number: of the chunk; the last one made is handed out again, any other is a `WrongChunkError`.
        """
        user, asked, token = self.user(name), time.monotonic(), object()
        user.waiting.add(token)
        future = self._worker.submit(self._turn, user, number, asked)
        future.add_done_callback(lambda _: user.waiting.discard(token))  # also if a client that left cancels it
        return future

    def change(self, name: str, prompt: str | None, cut: bool) -> Future[None]:
        """Put the coming chunks under another prompt, or into another scene."""
        return self._worker.submit(self._change, self.user(name), prompt, cut)

    def cancel(self, name: str) -> Future[None]:
        """End a session; a chunk of it that is being made is the last."""
        user = self.user(name)
        user.cancelled = True
        return self._worker.submit(self._end, user)

    def tidy(self) -> Future[None]:
        """Move all that are idle to the disk, and give the system what nobody needs."""
        return self._worker.submit(self._tidy)

    def stop(self) -> None:
        """Save all sessions, once what is asked for is made."""
        self.stopping = True
        everyone = self._worker.submit(lambda: self._evict(*(each for each in self.users.values() if each.stream)))
        self._worker.shutdown()
        everyone.result()

    # What follows runs in the one thread.

    def _resident(self) -> int:
        return sum(each.stream is not None for each in list(self.users.values()))

    def _held(self) -> int:
        return sum(each.held for each in list(self.users.values()) if each.stream is not None)

    def _idle(self) -> list[User]:
        before = time.monotonic() - self.idle_seconds
        users = [each for each in self.users.values() if each.stream is not None and not each.waiting]
        return sorted((each for each in users if each.used <= before), key=lambda each: each.used)

    def _tidy(self) -> None:
        try:
            self._evict(*self._idle())
        finally:
            with suppress(OSError, AttributeError):  # glibc keeps what is freed between blocks that are held
                ctypes.CDLL(None).malloc_trim(0)

    def _make_room(self) -> None:
        if self._resident() < self.capacity:
            return
        idle = self._idle()
        if not idle:
            raise FullError(f"{self.capacity} sessions fit, and none of them is idle; come back later")
        self._evict(idle[0])

    def _begin(self, prompt: str, seed: int) -> str:
        self._make_room()
        user = User(uuid.uuid4().hex, used=time.monotonic())
        noise = torch.Generator("cpu").manual_seed(seed)
        user.stream = self.pipeline.packforcing.stream(prompt=prompt, generator=noise, output_type="np")
        self._save(user, None)  # from here on it outlives the process
        self.users[user.name] = user
        return user.name

    def _turn(self, user: User, number: int | None, asked: float) -> tuple[int, Any]:
        self.waited.observe(time.monotonic() - asked)
        try:
            if user.cancelled:
                raise GoneError(f"session {user.name} was cancelled")
            with self.took.time():
                self._wake(user)  # what it says of its chunks holds
                if user.last is not None and number == user.chunks - 1:
                    return number, user.last
                if number not in (None, user.chunks):
                    raise WrongChunkError(f"chunk {number} is not at hand; the next is {user.chunks}")
                return self._next(user)
        finally:
            user.used = time.monotonic()

    def _next(self, user: User) -> tuple[int, Any]:
        prompt, cut = user.prompt or (None, False)
        try:
            frames = user.stream.send(prompt, cut=cut)[0]
        except Exception:  # the generation has ended with it; what was saved goes on
            user.stream.close()
            user.stream = user.last = None
            raise
        user.prompt, user.last = None, np.round(frames * 255).astype(np.uint8)
        user.held = self.pipeline.packforcing.stats()["resident_bytes"]
        user.chunks += 1
        self.made.inc()
        if user.chunks % SAVE_EVERY == 0:
            self._save(user, None)
        return user.chunks - 1, user.last

    def _change(self, user: User, prompt: str | None, cut: bool) -> None:
        self._wake(user)
        before = user.prompt or (None, False)
        told = (prompt if prompt is not None else before[0], cut or before[1])
        self._save(user, told)  # chunks made again behind SIGKILL are made under it too
        user.prompt = told

    def _wake(self, user: User) -> None:
        if user.stream is not None:
            return
        self._make_room()
        user.stream = self.pipeline.packforcing.resume(self.folder / user.name)
        told = user.stream.note["prompt"]
        user.prompt, user.chunks = None if told is None else tuple(told), user.stream.note["chunks"]
        with suppress(FileNotFoundError), self._last(user).open("rb") as file:
            if np.load(file) == user.chunks:  # else the newest snapshot is damaged, and the one before is used
                user.last = np.load(file)
        self.moved.labels("memory").inc()

    def _last(self, user: User) -> Path:
        return self.folder / f"{user.name}.npy"

    def _save(self, user: User, prompt: tuple[str | None, bool] | None) -> None:
        user.stream.save(self.folder / user.name, {"prompt": prompt, "chunks": user.chunks})

    def _evict(self, *users: User) -> None:
        failed: list[Exception] = []
        for user in users:
            try:
                self._save(user, user.prompt)
                if user.last is not None:
                    with whole_file(self._last(user), durable=True) as file:
                        np.save(file, user.chunks)
                        np.save(file, user.last)
            except Exception as error:  # it stays in memory, and the others are saved all the same
                failed.append(error)
                failed[0].add_note(f"session {user.name} was not saved: {error}")
                continue
            user.stream.close()
            user.stream = user.last = None
            self.moved.labels("disk").inc()
        if failed:
            raise failed[0]

    def _end(self, user: User) -> None:
        if user.stream is not None:
            user.stream.close()
        shutil.rmtree(self.folder / user.name, ignore_errors=True)
        self._last(user).unlink(missing_ok=True)
        self.users.pop(user.name, None)


def session_bytes(pipeline: Any, model: Path) -> int:
    """Return the most bytes that the memory of one session ever holds, however long it goes on.

    Raises:
        ValueError: if it grows without end.
    """
    adapter, memory, call = pipeline._kvpack.adapter, pipeline.packforcing.stack, timing(model)[0].call
    configs, dtype = adapter.configs(pipeline), pipeline.transformer.dtype
    geometry = adapter.geometry(configs, call.get("height", 480), call.get("width", 832), dtype)
    held = most_resident(geometry, memory, None, 1, channels_of(adapter.latent_shape(configs)))
    if held is None:
        raise ValueError(f"{memory.name} grows without end, which no budget holds; give the model a bounded memory")
    branches = 2 if call.get("guidance_scale", 5.0) > 1 else 1
    return held.bytes(geometry.layers) * branches * int(adapter.memories(pipeline))


def _saved_chunks(folder: Path) -> int:
    """Return the chunks behind a folder's newest snapshot; -1 if it has none."""
    return max(SnapshotFolder(folder).chunks(), default=-1) if folder.is_dir() else -1
