"""Ray: a cluster, or this machine for as long as a batch lasts, and what runs in the process of a worker."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

from kvpack.batch.folder import BatchFolder
from kvpack.batch.videos import Settings, Video
from kvpack.errors import InvalidOptionError, KVPackError, first_line


class Actor:
    """What runs in a worker's process."""

    def __init__(self, settings: dict[str, Any], folder: str) -> None:
        self.settings, self.folder = Settings(**settings), BatchFolder(Path(folder))

    def start(self) -> tuple[int, str | None]:
        """Load the pipeline, and return the process, and what is wrong with the pipeline."""
        from kvpack.batch.work import Work

        try:
            self.work = Work(self.settings, self.folder)
        except KVPackError as error:
            return os.getpid(), str(error)
        return os.getpid(), None

    def make(self, video: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Make a video and yield the frames that it has, then what the manifest says, or what is wrong."""
        wanted, frames = Video(**video), 0
        try:
            for frames in self.work.make(wanted):
                yield {"frames": frames}
            yield {"entry": self.work.entry(wanted, frames)}
        except KVPackError as error:
            yield {"entry": {"name": wanted.name, "error": str(error)}}


def require_ray() -> Any:
    """Return the module `ray`.

    Raises:
        InvalidOptionError: if it is not installed.
    """
    # Nobody is told of it: whoever wants to says so in this variable.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would let every other process of the machine go first.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports]  # it may be missing
    except ImportError as error:
        raise InvalidOptionError('a batch needs Ray; pip install "kvpack[ray]"') from error
    return ray


@contextmanager
def cluster(address: str | None, workers: int | None) -> Iterator[Any]:
    """Join the cluster of Ray at an address, or run one for `workers` here as long as the block lasts; yield `ray`.

    Raises:
        InvalidOptionError: if Ray is not installed, or the cluster is not there.
    """
    ray = require_ray()
    # Each worker asks for one at least.
    here: dict[str, Any] = {"include_dashboard": False, "num_cpus": max(workers or 1, cores())}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **({} if address else here))
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"no cluster of Ray answers at {address}" if address else "Ray does not start here"
        raise InvalidOptionError(f"{where} ({first_line(error)}); 'ray status' says what is there") from error
    if on_sigterm is not None and current_thread() is main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own, put over it, aborts this process
    try:
        yield ray
    finally:
        ray.shutdown()


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
