"""No memory left at any allocation of a generation that is saved, resumed, forked, rewound and told another prompt.

The seam is torch's dispatcher: a mode counts what may need memory, and raises `torch.OutOfMemoryError` at one of them.
What had ended with it is resumed from its folder, what had not is done again, and both give the bits of the generation
that had memory enough.
"""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.faults.generation import CALL, Faults, is_stock
from benchmarks.faults.tally import Tally
from benchmarks.report import SEED, say
from kvpack.testing import tiny_wan_pipeline

#: Two chunks, and then all that a stream can do, so that most blocks are in the archive when it is forked.
SCRIPT = "save next next save send next next save next rewind next fork save next next resume next call"
SHORT = "save next next send save next rewind fork save next resume"
_TWO = {"chunk_frames": 2}
_SIZES: dict[str, Any] = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 1, "archive_blocks": 3}
MEMORIES: dict[str, tuple[str, dict[str, Any]]] = {
    "packforcing": ("packforcing", _SIZES),
    "packforcing, int8": ("packforcing", {**_SIZES, "store": "int8"}),
    "packforcing, int8 on the host": ("packforcing", {**_SIZES, "store": "int8", "tier": "host"}),
    "packforcing, int4 on the disk": ("packforcing", {**_SIZES, "store": "int4", "tier": "disk"}),
    "packforcing, hr and fixed window": ("packforcing", {**_SIZES, "compressor": "hr", "reindexer": "contiguous"}),
    "deep-forcing": (
        "deep-forcing",
        {"window_frames": 9, "sink_frames": 3, "budget_frames": 6, "recent_frames": 2, "most_chosen": 2} | _TWO,
    ),
    "h2o": ("h2o", {"budget_frames": 6, "recent_frames": 2} | _TWO),
    "longlive": ("longlive", {"window_frames": 6, "sink_frames": 2} | _TWO),
    "memrope": ("memrope", {"sink_frames": 2, "recent_frames": 2} | _TWO),
}
_IN_PLACE = ("aten::fill_.Scalar", "aten::zero_", "aten::set_.source_Storage", "aten::_local_scalar_dense")
_HERE = ("/kvpack/", "/adapters/", "/policies/")


class Scarce(TorchDispatchMode):
    """Raises `torch.OutOfMemoryError` at one operation, and knows what all others have allocated.

    Args:
        at: number of the operation, from 0 on; None raises nowhere, and notes in whose line each one is.
    """

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at, self.count = at, 0
        self.places: dict[tuple[str, str], list[int]] = {}
        self._held: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or refuse to."""
        if allocates(func, args, kwargs or {}):
            self.count += 1
            if self.at is None:
                self.places.setdefault((func.name(), _caller()), []).append(self.count - 1)
            elif self.count == self.at + 1:
                raise torch.OutOfMemoryError(f"no memory left for {func.name()}")
        out = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.is_mutable:
            return out
        self._held += [StorageWeakRef(each.untyped_storage()) for each in tree_leaves(out) if torch.is_tensor(each)]
        return out

    def held(self) -> int:
        """Storages that were made in it and are still there."""
        return len({each.cdata for each in self._held if not each.expired()})


def allocates(func: Any, args: Any, options: Any) -> bool:
    """Whether an operation may need memory: all but views, one number, nothing, and copies that convert nothing."""
    if options.get("device") == torch.device("meta") or any(torch.is_tensor(each) and each.is_meta for each in args):
        return False
    if func.name() == "aten::copy_":
        into, of = args[:2]
        return bool((into.dtype, into.device) != (of.dtype, of.device))
    if func.name() == "aten::empty.memory_format":
        return 0 not in args[0]
    return not func.is_view and func.name() not in _IN_PLACE


def _caller() -> str:
    """Return the innermost line of kvpack's own that is being run."""
    frame: Any = sys._getframe(2)
    while frame is not None and not _ours(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


@cache
def _ours(file: str) -> bool:
    return any(each in file for each in _HERE)


class Play:
    """A pipeline that goes through the script, and picks itself up where memory was short.

    Args:
        pipe: the pipeline.
        folder: of the snapshots.
        script: what it does, in words.
    """

    def __init__(self, pipe: Any, folder: Path, script: str) -> None:
        self.pipe, self.folder, self.script, self.branch = pipe, folder, script.split(), 0
        self.frames: list[str] = []
        self.stream = self.begun()
        #: Where it goes on after a save: the next line of the script, the frames so far, the folder.
        self.saved = (0, 0, 0)

    def begun(self) -> Any:
        """Return a new stream."""
        return self.pipe.packforcing.stream(**call())

    def act(self, line: int) -> None:
        """Do what a line of the script says."""
        getattr(self, self.script[line])()
        if self.script[line] == "save":
            self.saved = (line + 1, len(self.frames), self.branch)

    def save(self) -> None:
        """Save."""
        self.stream.save(self.folder / str(self.branch))

    def next(self, prompt: str | None = None) -> None:
        """Make a chunk."""
        self.frames.append(digest(self.stream.send(prompt)))

    def send(self) -> None:
        """Make a chunk under another prompt."""
        self.next("a green triangle")

    def rewind(self) -> None:
        """Go back to the last save."""
        self.stream.rewind(len(self.frames) - self.saved[1])
        del self.frames[self.saved[1] :]

    def fork(self) -> None:
        """Go on with another future."""
        self.stream = self.stream.fork()
        self.branch += 1

    def resume(self) -> None:
        """Go on from the last save."""
        self.stream.close()
        self.stream = self.pipe.packforcing.resume(self.folder / str(self.branch))
        del self.frames[self.saved[1] :]

    def call(self) -> None:
        """Make a whole video by the pipeline's own call."""
        self.frames.append(digest(self.pipe(**{**call(), "num_frames": 29}).frames))

    def ended(self) -> list[weakref.ref[Any]]:
        """Let go of a stream, and return what must be gone with it."""
        run = self.stream._run  # None where memory was short behind its end
        sessions = [] if run is None else [weakref.ref(each) for each in run.sessions.values()]
        self.stream.close()
        self.stream = None
        return sessions


def call() -> dict[str, Any]:
    """Arguments of the call; one of a step and a branch, which is the same again and again."""
    less = {"prompt": "a red circle", "num_frames": None, "num_inference_steps": 1, "guidance_scale": 1.0}
    return {**CALL, **less, "generator": torch.Generator().manual_seed(SEED)}


def digest(frames: Any) -> str:
    """Return a name for some frames that no others have."""
    return sha256(frames.numpy().tobytes()).hexdigest()


def starved_pipeline(name: str) -> Any:
    """Return a pipeline with one of the memories."""
    pipe: Any = tiny_wan_pipeline(num_layers=1)
    pipe.set_progress_bar_config(disable=True)
    stack, options = MEMORIES[name]
    return pipe.enable_packforcing(stack, **options)


def plenty(pipe: Any, folder: Path, script: str = SCRIPT) -> tuple[list[str], Scarce, int]:
    """Go through the script with memory enough: the frames, where memory was asked for, and what stays allocated."""
    with Scarce(None) as scarce:
        play = played(pipe, folder, script)
    play.ended()
    gc.collect()
    return play.frames, scarce, scarce.held()


def played(pipe: Any, folder: Path, script: str) -> Play:
    """Go through the script."""
    play = Play(pipe, folder, script)
    for line in range(len(play.script)):
        play.act(line)
    return play


def starved(pipe: Any, folder: Path, at: int, most: int, script: str = SCRIPT) -> tuple[list[str], bool]:
    """Go through the script with one operation that has no memory, and pick it up there.

    Args:
        pipe: the pipeline.
        folder: an empty one.
        at: number of the operation.
        most: storages that may stay allocated behind what had to end.
        script: what is done.

    Returns:
        The frames, and whether nothing of kvpack or of an ended generation was left.
    """
    clean, line, play = True, 0, None
    with Scarce(at) as scarce:
        while play is None or line < len(play.script):
            try:
                play = play or Play(pipe, folder, script)
                play.act(line)
                line += 1
            except torch.OutOfMemoryError:
                clean = clean and is_stock(pipe)
            else:
                continue
            if play is None or play.stream._frames.gi_frame is not None:
                continue  # it has not ended: the same again
            clean = clean and _freed(play, scarce, most)
            line, frames, play.branch = play.saved
            del play.frames[frames:]
            play.stream = pipe.packforcing.resume(folder / str(play.branch))
            play.stream.save(folder / str(play.branch))  # so that it can be rewound
    assert play is not None
    play.ended()
    return play.frames, clean


def _freed(play: Play, scarce: Scarce, most: int) -> bool:
    sessions = play.ended()
    gc.collect()
    return all(each() is None for each in sessions) and scarce.held() <= most


def points(scarce: Scarce, faults: Faults) -> list[int]:
    """Return one operation of each line that needs memory, drawn from those of the line; a small run has a few lines.

    Args:
        scarce: knows in whose line each operation is.
        faults: draws.
    """
    places = list(scarce.places.values())
    chosen = faults.draw.sample(places, faults.times(40)) if faults.small else places
    return [faults.draw.choice(each) for each in chosen]


def out_of_memory(faults: Faults, name: str) -> Tally:
    """Let an operation of a generation have no memory: in each line of kvpack that asks for it."""
    tally, pipe, script = Tally(), starved_pipeline(name), SHORT if faults.small else SCRIPT
    with faults.new_folder() as folder, quiet():
        played(pipe, folder / "first", script).ended()  # what the pipeline keeps from its first call on is made now
        whole, scarce, most = plenty(pipe, folder / "whole", script)
        for at in points(scarce, faults):
            tally.tried += 1
            with faults.new_folder() as own:
                try:
                    frames, clean = starved(pipe, own, at, most, script)
                except Exception as error:
                    say(f"faults: {name}: no memory at {at}: {type(error).__name__}: {error}")
                    continue
            if not clean:
                say(f"faults: {name}: no memory at {at}: something was left behind")
            tally.survived += clean
            tally.resumed += 1
            tally.identical += frames == whole
            if frames != whole:
                say(f"faults: {name}: no memory at {at}: other bits")
    return tally


@contextmanager
def quiet() -> Iterator[None]:
    """Let no warning through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
