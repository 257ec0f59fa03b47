"""One piece of work: all captions of one memory, or one reference, with one noise seed."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kvpack.checkpoints import config
from kvpack.memory import Memory
from kvpack.version import __version__

VERSION = 1  # raised where what is kept of a rollout changes its meaning


@dataclass(frozen=True)
class Settings:
    """What all rollouts of a table share.

    Args:
        pipeline: folder of the diffusers pipeline.
        seconds: length of the videos.
        captions: how many, the held-out ones first.
        steps: denoising steps of a chunk.
        batch: captions that are generated together; no figure depends on it.
        video: whether the first caption's mp4 is kept.
        alone: whether nothing else runs, so that times mean something.
        runs: folder that finished rollouts are kept in.
    """

    pipeline: Path
    seconds: int
    captions: int
    steps: int
    batch: int
    video: bool
    alone: bool
    runs: Path


@dataclass(frozen=True)
class Task:
    """A rollout to make.

    Args:
        name: what messages call it.
        source: a memory, or the name of a reference.
        seed: of the noise, or of the reference's clips.
        weights: hash of the pipeline.
        settings: what it shares with others.
    """

    name: str
    source: Memory | str
    seed: int
    weights: str
    settings: Settings

    def facts(self) -> dict[str, Any]:
        """Return all that the frames depend on, as plain data; not the name, so that equal stacks are made once."""
        source: Any = self.source if isinstance(self.source, str) else self.source.to_dict()
        if isinstance(source, dict):
            source.pop("replay_frames", None)  # no prompt changes
            if trained := source.get("compressor", {}).get("weights"):
                source["compressor"]["weights"] = fingerprint(Path(trained))
        shared = asdict(self.settings)
        return {
            "version": VERSION,
            "kvpack": __version__,
            "source": source,
            "code": code(self.source),
            "seed": self.seed,
            "weights": self.weights,
            **{name: shared[name] for name in ("seconds", "captions", "steps")},
        }

    @property
    def folder(self) -> Path:
        """The folder of the finished rollout."""
        data = json.dumps(self.facts(), sort_keys=True).encode()
        return self.settings.runs / hashlib.sha256(data).hexdigest()[:16]


def code(source: Memory | str) -> str:
    """Return a hash of the modules that define a memory and its policies, and of what these import from beside them.

    The engine is left out: its bits are held by tests, and changes of it would make every rollout anew.
    """
    if isinstance(source, str):
        return ""
    members = fields(source) if is_dataclass(source) else ()
    parts = [source, *(getattr(source, each.name) for each in members)]
    found: dict[str, ModuleType] = {}
    for kind in {base for part in parts for base in type(part).__mro__}:
        _collect(sys.modules[kind.__module__], found)
    made = hashlib.sha256()
    for name in sorted(found):
        made.update(f"{name}\n{inspect.getsource(found[name])}".encode())
    return made.hexdigest()[:16]


def _collect(module: ModuleType, found: dict[str, ModuleType]) -> None:
    package = module.__name__.rpartition(".")[0]
    standard = module.__name__.partition(".")[0] in sys.stdlib_module_names
    if module.__name__ in found or standard or package == "kvpack.memory":
        return
    found[module.__name__] = module
    for value in vars(module).values():
        name = getattr(value, "__module__", None)
        if isinstance(name, str) and package and name.startswith(f"{package}."):
            _collect(sys.modules[name], found)


def fingerprint(pipeline: Path) -> str:
    """Return a hash of a pipeline's weights and configs, but for the memory that it recommends: a task names its own.

    Raises:
        FileNotFoundError: if the folder holds none.
    """
    kept = (path for path in pipeline.rglob("*") if path.suffix in (".safetensors", ".json"))
    files = sorted(path for path in kept if path.name != config.FILE)
    if not files:
        raise FileNotFoundError(f"no pipeline in {pipeline}")
    made = hashlib.sha256()
    for path in files:
        made.update(f"{path.relative_to(pipeline)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return made.hexdigest()[:16]
