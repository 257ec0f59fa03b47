"""A generation written into a folder of snapshots."""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import diffusers
import torch

from kvpack.errors import OutputError, SnapshotError
from kvpack.generation.adapter import Adapter
from kvpack.generation.moment import captured
from kvpack.generation.run import Run
from kvpack.media.files import make_folder
from kvpack.memory.base import Memory
from kvpack.memory.shard import Shard
from kvpack.plugins.registry import package_version, registry
from kvpack.snapshots.fingerprint import fingerprints, model_digests
from kvpack.snapshots.folder import SnapshotFolder, tensor_files
from kvpack.snapshots.heads import gathering
from kvpack.snapshots.lock import FolderLock
from kvpack.snapshots.types import allowed_classes, policies_of
from kvpack.snapshots.writing import TreeWriter, Written
from kvpack.version import __version__

#: Of the arguments of a call, how one is written that is a function: whoever resumes gives it again.
GIVEN_AGAIN = {"given": "again"}
#: Files of older blocks, beyond which all are written anew into one.
_MOST_FILES = 32


class Saver:
    """Writes snapshots of one generation into one folder, which no other process may write into meanwhile.

    Args:
        path: the folder.
        generation: says which generation it is; another one's snapshots are not overwritten.
        shard: the process, where several hold a layer's heads; the first of them writes those of all.

    Raises:
        OutputError: if the folder cannot be made, holds another generation, or is being written by another process.
    """

    def __init__(self, path: Path, generation: str, shard: Shard | None = None) -> None:
        self.folder, self.generation, self._shard = SnapshotFolder(path), generation, shard
        self._lock: FolderLock | None = None
        try:
            with self._together():
                if self._writes:
                    self._lock = FolderLock(make_folder(path))  # locked before anything in it is looked at
                    self.folder.require_own(generation)
            # Numbers go on, so that older files are never written over.
            self._number = max(self.folder.numbers(), default=0)
        except BaseException:  # an interrupt too: its traceback may live on, and the lock with it
            self.close()
            raise
        self._device: torch.device | None = None  # diffusers looks through all modules for it
        #: What is in the files of every other snapshot, so that the two that are kept share none.
        self._written: tuple[Written, Written] = (WeakKeyDictionary(), WeakKeyDictionary())

    def save(self, run: Run, note: Any = None) -> None:
        """Write a snapshot; what the one before the last has in its files is not written again.

        Args:
            run: the generation, between two chunks.
            note: what JSON takes, to be handed to whoever resumes.

        Raises:
            SnapshotError: if the generation is in the middle of a chunk, or something of it, or the note, is no data.
            OutputError: if it cannot be written; the snapshots of before are still there.
        """
        with self._together():
            require_json(note)
        number = self._number + 1
        # The one before the last: see `_written`.
        content, writer = self._tree(run, tensor_files(number), self._written[0])
        if worn := self._worn(writer):
            known = self._written[0].items()
            left = WeakKeyDictionary({thing: each for thing, each in known if not worn & set(each[1])})
            content, writer = self._tree(run, tensor_files(number), left)
        with self._together():
            if self._writes:  # the first rank writes for all, and all learn if it could not
                self.folder.write(number, {**content, "note": note}, writer.tensors, writer.used)
        self._number = number
        if self._shard is None:  # what is in files already is known to the process alone that wrote them
            self._written = self._written[1], writer.kept  # the two take turns

    def close(self) -> None:
        """Let others write into the folder."""
        if self._lock is not None:
            self._lock.release()

    @property
    def _writes(self) -> bool:
        return self._shard is None or self._shard.rank == 0

    def _together(self) -> AbstractContextManager[None]:
        return nullcontext() if self._shard is None else self._shard.together(OutputError)

    def _tree(self, run: Run, files: tuple[str, str], written: Written) -> tuple[dict[str, Any], TreeWriter]:
        policies = policies_of(run.stack)
        device = self._device = self._device or run.pipeline._execution_device
        heads = None if self._shard is None else gathering(self._shard)
        writer = TreeWriter(allowed_classes(run.stack, run.adapter), policies, device, files, written, heads)
        moment = captured(run, apart=False)  # written before the next chunk begins, so nothing need be copied
        call = {name: GIVEN_AGAIN if callable(value) else value for name, value in moment.run["call"].items()}
        parts = {each.name: getattr(moment, each.name) for each in fields(moment)}
        parts["run"] = {**moment.run, "call": call}
        index, first = run.position or (0, 0)
        content = {
            **versions(),
            "plugins": plugins(run.stack, run.adapter),
            **fingerprints(run.pipeline, model_digests(run.pipeline)),
            "generation": self.generation,
            "adapter": run.adapter.name,
            "pipeline": run.pipeline._kvpack_base.__name__,
            "chunks": index,
            "latent_frames": first,
            "fps": run.pipeline.packforcing.fps,
            "stack": writer.node(run.stack.to_dict(), "stack"),
            "geometry": writer.node(run.denoiser.geometry, "geometry"),
            # `TreeWriter._field` gathers heads of what begins with "pasts".
            "state": {name: writer.node(each, "" if name == "run" else name) for name, each in parts.items()},
        }
        return content, writer

    def _worn(self, writer: TreeWriter) -> set[str]:
        """Return older files that are gone or of which less than half is still needed, or all if they are many."""
        older = [name for name in writer.used if name not in writer.tensors]
        if not older or len(older) > _MOST_FILES:
            return set(older)
        sizes = self.folder.sizes()
        return {name for name in older if not 0 < sizes.get(name, 0) <= 2 * writer.used[name]}  # 0 if it is gone


def require_json(note: Any) -> None:
    """Raise `SnapshotError` unless a note is what JSON takes."""
    try:
        json.dumps(note, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SnapshotError(f"note must be what JSON takes: texts, finite numbers, lists, dicts ({error})") from error


def versions() -> dict[str, str]:
    """Return the versions that a snapshot is written with."""
    return {"kvpack": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


def plugins(stack: Memory, adapter: Adapter) -> dict[str, str]:
    """Return the versions of the packages, other than kvpack, that a memory, its policies and an adapter are of."""
    named = {(each.role, each.name) for each in policies_of(stack).values()}
    named |= {("stack", stack.name), ("adapter", adapter.name)}
    packages = {package for name, package in registry().origins.items() if name in named} - {"kvpack"}
    return {package: package_version(package) for package in sorted(packages)}
