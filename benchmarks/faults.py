"""Faults: a checkpointing generation is killed, damaged, lied to and starved; each time it is resumed and compared.

Every kind of fault is tried many times on the tiny Wan pipeline with random weights. "tried" counts the faults;
"survived" those behind which the generation went on from a snapshot, was begun anew where there was none yet, or, where
no snapshot can be right, was refused in one line by an error of kvpack. "bit-identical" counts those of the "resumed"
whose remaining frames are the very bits of the generation that nothing interrupted; "lost" and "other bits" are what is
missing. A child process is a fork, so that a kill costs no import.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import SEED, Bar, Row, say, script
from kvpack.errors import KVPackError, NonFiniteLatentsError, OutputError
from kvpack.snapshots import folder as folders
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": [(0, "a red circle"), (2.0, "the blue square")],
    "height": 16,
    "width": 32,
    "num_frames": 85,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
    "output_type": "pt",
}
SIZES = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 2, "archive_blocks": 3}
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


class Faults:
    """The generation, what it makes when nothing happens, and the faults."""

    def __init__(self, folder: Path, small: bool) -> None:
        self.folder, self.small, self.draw = folder, small, random.Random(SEED)
        self.pipe = made()
        self.whole = list(self.stream())
        start = time.perf_counter()
        self.generate(folder / "timed")
        self.seconds = time.perf_counter() - start

    def times(self, count: int) -> int:
        """How often a fault is tried."""
        return max(2, count // 20) if self.small else count

    def stream(self, **changed: Any) -> Any:
        """Return a new stream."""
        generator = torch.Generator().manual_seed(SEED)
        return self.pipe.packforcing.stream(**{**CALL, "generator": generator, **changed})

    def generate(self, folder: Path, stream: Any = None, chunks: int | None = None) -> None:
        """Save before the first chunk and behind each."""
        stream = stream or self.stream()
        try:
            stream.save(folder)
            for _ in islice(stream, chunks):
                stream.save(folder)
        finally:
            stream.close()

    def check(self, tally: Tally, folder: Path, given: dict[str, Any] | None = None) -> None:
        """Resume with another pipeline and compare; a folder without any snapshot is begun anew."""
        tally.tried += 1
        if not list(folder.glob("snapshot-*.json")):
            tally.survived += 1
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rest = list(made().packforcing.resume(folder, **(given or {})))
        tally.survived += 1
        tally.resumed += 1
        expected = self.whole[len(self.whole) - len(rest) :]
        tally.identical += all(torch.equal(a, b) for a, b in zip(rest, expected, strict=True))

    @contextmanager
    def new_folder(self) -> Iterator[Path]:
        """Give an empty folder, removed afterwards."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        yield folder
        shutil.rmtree(folder)

    # Processes that end

    def killed(self, number: int, count: int) -> Tally:
        """Send a signal at random moments of a generation that saves behind every chunk."""
        tally = Tally()
        for _ in range(self.times(count)):
            with self.new_folder() as folder:
                child = forked(lambda folder=folder: self.generate(folder))
                time.sleep(self.draw.uniform(0, self.seconds))
                with suppress(ProcessLookupError):
                    os.kill(child, number)
                os.waitpid(child, 0)
                self.check(tally, folder)
        return tally

    def killed_at_file_operations(self) -> Tally:
        """Kill at each file operation of a save: every order in which the disk can have seen them."""
        tally, operations = Tally(), 0
        while True:
            with self.new_folder() as folder:
                child = forked(lambda folder=folder, at=operations: self._save_until(folder, at, kill))
                _, status = os.waitpid(child, 0)
                if not os.WIFSIGNALED(status):
                    return tally
                self.check(tally, folder)
            operations += 3 if self.small else 1

    def full_disk(self) -> Tally:
        """Let each file operation of a save fail; what was there stays, and the generation is saved elsewhere."""
        tally, operations = Tally(), 0
        while True:
            with self.new_folder() as folder:
                stream = self.stream()
                try:
                    self._save_until(folder / "one", operations, refuse, stream)
                    stream.close()
                    return tally
                except OutputError:
                    stream.save(folder / "two")
                    stream.close()
                self.check(tally, folder / "one")
                self.check(tally, folder / "two")
            operations += 3 if self.small else 1

    def _save_until(self, folder: Path, at: int, fault: Callable[[], None], stream: Any = None) -> None:
        """Save three times, with a fault at one file operation of the third save."""
        stream = stream or self.stream()
        stream.save(folder)
        for _ in islice(stream, 2):
            stream.save(folder)
        next(stream)
        with counted_operations(at, fault):
            stream.save(folder)

    # Files that are damaged

    def damaged(self, count: int) -> Tally:
        """Damage one file of the newest snapshot; the one before is used."""
        tally = Tally()
        with self.new_folder() as saved:
            self.generate(saved, chunks=7)
            newest = max(saved.glob("snapshot-*"))
            own = [newest, *(saved / name for name in json.loads(newest.read_text())["files"])]
            for index in range(self.times(count)):
                with self.new_folder() as folder:
                    copy = shutil.copytree(saved, folder / "copy")
                    self._damage(copy / own[index % len(own)].name, index // len(own))
                    self.check(tally, copy)
        return tally

    def _damage(self, path: Path, kind: int) -> None:
        data = bytearray(path.read_bytes())
        place = self.draw.randrange(len(data))
        if kind % 5 == 0:
            data[place] ^= 1 << self.draw.randrange(8)
        elif kind % 5 == 1:
            del data[place:]
        elif kind % 5 == 2:
            data[place : place + 64] = self.draw.randbytes(64)
        elif kind % 5 == 3:
            others = [each for each in sorted(path.parent.glob(f"*{path.suffix}")) if each != path]
            data = bytearray(self.draw.choice(others).read_bytes())
        else:
            path.unlink()
            return
        path.write_bytes(data)

    def hostile(self, count: int) -> Tally:
        """Change a snapshot's tree anywhere, with a fitting checksum; it is refused in one line, or goes on."""
        tally = Tally()
        with self.new_folder() as folder:
            self.generate(folder, chunks=5)
            min(folder.glob("snapshot-*")).unlink()
            (path,) = folder.glob("snapshot-*")
            content = json.loads(path.read_text())
            del content["sha256"]
            for _ in range(self.times(count)):
                other = json.loads(json.dumps(content))
                self._change(other)
                path.write_text(json.dumps({**other, "sha256": folders._digest(other)}))
                tally.tried += 1
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        self.pipe.packforcing.resume(folder).close()
                    except KVPackError as error:
                        tally.survived += "\n" not in str(error)
                    except Exception as error:
                        say(f"faults: {type(error).__name__} of a changed tree: {error}")
                    else:
                        tally.survived += 1
        return tally

    def _change(self, tree: Any) -> None:
        """Replace a node of a tree by another one, or by something else."""
        nodes = list(nodes_of(tree))
        parent, key = self.draw.choice(nodes)
        other, place = self.draw.choice(nodes)
        junk = [None, True, -1, 10**30, 1e300, "", "x" * 1000, [], {}, {"!": "tensor"}, [[[]]], other[place]]
        parent[key] = json.loads(json.dumps(self.draw.choice(junk)))

    # Chunks that fail

    def failing(self, fault: Callable[[Any, int], Any], error: type[Exception], count: int) -> Tally:
        """Let a callback fail in a random step; the pipeline is the stock one again, and the memory is freed."""
        tally = Tally()
        for _ in range(self.times(count)):
            at, seen = self.draw.randrange(2, 2 * len(self.whole)), []

            def callback(_: Any, __: int, ___: Any, tensors: Any, at: int = at, seen: list[int] = seen) -> Any:
                seen.append(0)
                return fault(tensors, len(seen)) if len(seen) == at else {}

            with self.new_folder() as folder:
                stream = self.stream(callback_on_step_end=callback)
                with suppress(error):
                    self.generate(folder, stream)
                sessions = [weakref.ref(each) for each in stream._run.sessions.values()]
                del stream
                gc.collect()
                if any(each() is not None for each in sessions) or not is_stock(self.pipe):
                    tally.tried += 1
                    continue
                self.check(tally, folder, {"callback_on_step_end": lambda *_: {}})
        return tally

    def out_of_memory(self, count: int) -> Tally:
        """Let a random allocation of a chunk fail."""
        tally, cat, new_empty = Tally(), torch.cat, torch.Tensor.new_empty
        for _ in range(self.times(count)):
            left = [self.draw.randrange(400)]

            def failing(function: Any, left: list[int] = left) -> Any:
                def call(*arguments: Any, **options: Any) -> Any:
                    left[0] -= 1
                    if left[0] == 0:
                        raise MemoryError("no memory left")
                    return function(*arguments, **options)

                return call

            with self.new_folder() as folder:
                stream = self.stream()
                stream.save(folder)
                torch.cat, torch.Tensor.new_empty = failing(cat), failing(new_empty)  # type: ignore[method-assign]
                try:
                    with suppress(MemoryError):
                        self.generate(folder, stream)
                finally:
                    torch.cat, torch.Tensor.new_empty = cat, new_empty  # type: ignore[method-assign]
                    stream.close()
                if is_stock(self.pipe):
                    self.check(tally, folder)
                else:
                    tally.tried += 1
        return tally

    def two_writers(self) -> Tally:
        """Let two processes save into one folder: the second is refused, whoever it is."""
        tally = Tally()
        with self.new_folder() as folder:
            stream = self.stream(num_frames=None)
            stream.save(folder)
            for _ in range(self.times(20)):
                next(stream)
                child = forked(lambda: made().packforcing.resume(folder).save(folder))
                _, status = os.waitpid(child, 0)
                tally.tried += 1
                tally.survived += os.waitstatus_to_exitcode(status) == REFUSED
            stream.close()
        return tally

    # Videos

    def killed_videos(self, count: int) -> Tally:
        """Kill `kvpack generate --checkpoint-every 1` at random moments; decoded frames are those of the whole."""
        tally = Tally()
        model = self.folder / "model"
        tiny_wan_pipeline().save_pretrained(model)
        start = time.perf_counter()
        generate(model, self.folder / "whole.mp4")
        seconds, whole = time.perf_counter() - start, pixels(self.folder / "whole.mp4")
        for _ in range(self.times(count)):
            with self.new_folder() as folder:
                output = folder / "a.mp4"
                child = forked(lambda output=output: generate(model, output))
                time.sleep(self.draw.uniform(0.1, 1) * seconds)
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                tally.tried += 1
                checkpoint = folder / "a.mp4.checkpoint"
                if not output.exists() and not list(checkpoint.glob("snapshot-*")):
                    tally.survived += 1  # it had not begun
                    continue
                if checkpoint.exists() and list(checkpoint.glob("snapshot-*")):
                    command("resume", str(checkpoint), "--json")
                tally.survived += 1
                tally.resumed += 1
                tally.identical += np.array_equal(pixels(output), whole)
        return tally


REFUSED = 3


def made() -> Any:
    """Return another pipeline with the same weights, enabled."""
    pipe = tiny_wan_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe.enable_packforcing("packforcing", **SIZES)


def is_stock(pipe: Any) -> bool:
    """Return whether nothing of kvpack is left in a transformer between two calls."""
    transformer = pipe.transformer
    return (
        all(type(block.attn1.processor).__name__ == "WanAttnProcessor" for block in transformer.blocks)
        and not transformer._forward_pre_hooks
        and not transformer.patch_embedding._forward_hooks
    )


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


def nodes_of(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield where each node of a tree is: its parent and its key or index."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from nodes_of(value)


def command(*words: str) -> None:
    """Run the command line."""
    from typer.testing import CliRunner

    from kvpack.cli import app

    result = CliRunner().invoke(app, list(words))
    if result.exit_code:
        raise RuntimeError(result.output)


def generate(model: Path, output: Path) -> None:
    """Write a video with a checkpoint behind each chunk; smaller frames libx264 encodes to other bits at times."""
    words = f"generate --model {model} --output {output} --prompt night --seconds 5 --height 64 --width 64 --steps 1"
    more = "--guidance-scale 1 --call max_sequence_length=8 --device cpu -o topk=2 --checkpoint-every 1 --json"
    command(*words.split(), *more.split())


def pixels(path: Path) -> np.ndarray:
    """All frames of a video file."""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def poisoned(tensors: Any, _: int) -> Any:
    """Put NaN into the latents."""
    return {"latents": tensors["latents"] * torch.nan}


def raising(_: Any, __: int) -> Any:
    """Fail in a callback."""
    raise ZeroDivisionError("a callback failed")


def run(small: bool = False) -> list[Row]:
    """Counts of each kind of fault."""
    if not hasattr(os, "fork"):
        sys.exit("this benchmark needs os.fork")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), small)
        kinds: dict[str, Callable[[], Tally]] = {
            "kill -9 at a random moment": lambda: faults.killed(signal.SIGKILL, 100),
            "SIGINT at a random moment": lambda: faults.killed(signal.SIGINT, 20),
            "SIGTERM at a random moment": lambda: faults.killed(signal.SIGTERM, 20),
            "kill -9 at each file operation of a save": faults.killed_at_file_operations,
            "kill -9 of kvpack generate, decoded frames": lambda: faults.killed_videos(20),
            "disk full at each file operation of a save": faults.full_disk,
            "a file of the newest snapshot is damaged": lambda: faults.damaged(100),
            "a snapshot's tree is changed, with its checksum": lambda: faults.hostile(2000),
            "NaN in a chunk": lambda: faults.failing(poisoned, NonFiniteLatentsError, 20),
            "an exception in a callback": lambda: faults.failing(raising, ZeroDivisionError, 20),
            "no memory at a random allocation": lambda: faults.out_of_memory(40),
            "two processes save into one folder": faults.two_writers,
        }
        for name, fault in kinds.items():
            start = time.perf_counter()
            tally = fault()
            say(f"faults: {name}: {tally} in {time.perf_counter() - start:.0f} s")
            rows += tally.rows(name)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)  # forks, and tensors that are too small for more
    script("faults", __doc__ or "", run, BARS)
