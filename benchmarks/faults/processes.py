"""Processes that end at any moment, disks that are full, and two processes in one folder."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.generation import Faults, made
from benchmarks.faults.tally import Tally
from kvpack.errors import KVPackError, OutputError
from kvpack.testing import tiny_wan_pipeline

REFUSED = 3


def killed(faults: Faults, number: int, count: int) -> Tally:
    """Send a signal at random moments of a generation that saves behind every chunk."""
    tally = Tally()
    for _ in range(faults.times(count)):
        with faults.new_folder() as folder:
            child = forked(lambda folder=folder: faults.generate(folder))
            time.sleep(faults.draw.uniform(0, faults.seconds))
            with suppress(ProcessLookupError):
                os.kill(child, number)
            os.waitpid(child, 0)
            faults.check(tally, folder)
    return tally


def killed_at_file_operations(faults: Faults) -> Tally:
    """Kill at each file operation of a save: every order in which the disk can have seen them."""
    tally, operations = Tally(), 0
    while True:
        with faults.new_folder() as folder:
            fault = counted_operations(operations, kill)
            child = forked(lambda folder=folder, fault=fault: _save_until(faults, folder, fault))
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                return tally
            faults.check(tally, folder)
        operations += 3 if faults.small else 1


def full_disk(faults: Faults) -> Tally:
    """Let each file operation of a save fail; what was there stays, and the generation is saved elsewhere."""
    tally, operations = Tally(), 0
    while _save_fails(faults, tally, counted_operations(operations, refuse)):
        operations += 3 if faults.small else 1
    return tally


def full_files(faults: Faults, count: int) -> Tally:
    """Let writing itself fail, behind some bytes of a file; what was there stays, and it is saved elsewhere."""
    tally = Tally()
    for index in range(faults.times(count)):
        # Small files fail at once, the largest only behind most of it.
        _save_fails(faults, tally, limited_files(int(2 ** faults.draw.uniform(4, 16)) if index else 0))
    return tally


def _save_fails(faults: Faults, tally: Tally, fault: AbstractContextManager[None]) -> bool:
    """Save with a fault, and go on from what is there and from elsewhere; return whether it has failed."""
    with faults.new_folder() as folder:
        stream = faults.stream()
        try:
            _save_until(faults, folder / "one", fault, stream)
            stream.close()
            return False
        except OutputError:
            stream.save(folder / "two")
            stream.close()
        faults.check(tally, folder / "one")
        faults.check(tally, folder / "two")
    return True


def _save_until(faults: Faults, folder: Path, fault: AbstractContextManager[None], stream: Any = None) -> None:
    """Save four times, with a fault in the last save."""
    stream = stream or faults.stream()
    stream.save(folder)
    for _ in islice(stream, 2):
        stream.save(folder)
    next(stream)
    with fault:
        stream.save(folder)


def two_writers(faults: Faults) -> Tally:
    """Let two processes save into one folder: the second is refused, whoever it is."""
    tally = Tally()
    with faults.new_folder() as folder:
        stream = faults.stream(num_frames=None)
        stream.save(folder)
        for _ in range(faults.times(20)):
            next(stream)
            child = forked(lambda: made().packforcing.resume(folder).save(folder))
            _, status = os.waitpid(child, 0)
            tally.tried += 1
            tally.survived += os.waitstatus_to_exitcode(status) == REFUSED
        stream.close()
    return tally


def killed_videos(faults: Faults, count: int) -> Tally:
    """Kill `kvpack generate --checkpoint-every 1` at random moments; decoded frames are those of the whole.

    A child that was done before it was killed, or had not begun, is none of the count.
    """
    tally = Tally()
    model, wanted, length = faults.folder / "model", faults.times(count), 3 if faults.small else 5
    tiny_wan_pipeline().save_pretrained(model)
    generate(model, faults.folder / "whole.mp4", length)
    whole, start = pixels(faults.folder / "whole.mp4"), time.perf_counter()
    os.waitpid(forked(lambda: generate(model, faults.folder / "timed.mp4", length)), 0)
    seconds = time.perf_counter() - start  # of a child, which has imported everything
    for _ in range(10 * wanted):
        if tally.tried == wanted:
            break
        with faults.new_folder() as folder:
            output = folder / "a.mp4"
            child = forked(lambda output=output: generate(model, output, length))
            time.sleep(faults.draw.uniform(0.1, 1) * seconds)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            checkpoint = folder / "a.mp4.checkpoint"
            if not os.WIFSIGNALED(status) or not (begun := list(checkpoint.glob("snapshot-*")) or output.exists()):
                continue
            tally.tried += 1
            if begun is not True:
                command("resume", str(checkpoint), "--json")
            tally.survived += 1
            tally.resumed += 1
            tally.identical += np.array_equal(pixels(output), whole)
    return tally


def forked(work: Callable[[], Any]) -> int:
    """Run something in a child process, and return its id; it ends with 3 if kvpack refuses something."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        work()
        code = 0
    except KVPackError:
        code = REFUSED
    finally:
        os._exit(code)


def kill() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def limited_files(most: int) -> Iterator[None]:
    """Let what is written behind so many bytes of any file fail, in this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def counted_operations(at: int, fault: Callable[[], None]) -> Iterator[None]:
    """Let something happen before one file operation of the block."""
    left, before = [at], {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}

    def counting(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                fault()
            return function(*arguments, **options)

        return call

    for name, function in before.items():
        setattr(os, name, counting(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(os, name, function)


def command(*words: str) -> None:
    """Run the command line."""
    from typer.testing import CliRunner

    from kvpack.cli import app

    result = CliRunner().invoke(app, list(words))
    if result.exit_code:
        raise RuntimeError(result.output)


def generate(model: Path, output: Path, seconds: int) -> None:
    """Write a video with a checkpoint behind each chunk; smaller frames libx264 encodes to other bits at times."""
    words = f"generate --model {model} --output {output} --prompt night --seconds {seconds} --height 64 --width 64"
    more = (
        "--steps 1 --guidance-scale 1 --call max_sequence_length=8 --device cpu -o topk=2 --checkpoint-every 1 --json"
    )
    command(*words.split(), *more.split())


def pixels(path: Path) -> np.ndarray:
    """All frames of a video file."""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
