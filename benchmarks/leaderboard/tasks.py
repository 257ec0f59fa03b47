"""One piece of work: all captions of one memory, or one reference, with one noise seed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvpack.memory import Memory

VERSION = 1  # raised where what is kept of a rollout changes its meaning


@dataclass(frozen=True)
class Settings:
    """What all rollouts of a table share.

    Args:
        pipeline: folder of the diffusers pipeline.
        seconds: length of the videos.
        captions: how many of the held-out captions.
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
            "source": source,
            "seed": self.seed,
            "weights": self.weights,
            **{name: shared[name] for name in ("seconds", "captions", "steps")},
        }

    @property
    def folder(self) -> Path:
        """The folder of the finished rollout."""
        data = json.dumps(self.facts(), sort_keys=True).encode()
        return self.settings.runs / hashlib.sha256(data).hexdigest()[:16]


def fingerprint(pipeline: Path) -> str:
    """Return a hash of a pipeline's weights and configs.

    Raises:
        FileNotFoundError: if the folder holds none.
    """
    files = sorted(path for path in pipeline.rglob("*") if path.suffix in (".safetensors", ".json"))
    if not files:
        raise FileNotFoundError(f"no pipeline in {pipeline}")
    made = hashlib.sha256()
    for path in files:
        made.update(f"{path.relative_to(pipeline)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return made.hexdigest()[:16]
