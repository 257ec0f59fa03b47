"""The model that a page makes videos with, and the videos that it begins, resumes and forks."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock
from typing import Any

import torch

from kvpack.checkpoints.config import Settings
from kvpack.cli.support import default_device, parse_compared, unknown_words
from kvpack.cli.ui.video import Video
from kvpack.errors import InvalidOptionError, require_seed
from kvpack.generation.adapter import call_signature
from kvpack.pipeline.track import load_pipeline
from kvpack.planning.planner import video_frames
from kvpack.planning.presets import timing
from kvpack.shipped import demo_stack, shipped_folder
from kvpack.snapshots.resuming import saved_stack


@dataclass
class Model:
    """A pipeline that was loaded; each video has a copy of it with a memory of its own, and the same weights.

    Args:
        folder: where it is from; None is the tiny one that comes with kvpack.
        device: where it runs.

    Raises:
        InvalidOptionError: if its videos begin with something that the page has no box for, e.g. a picture.
    """

    folder: Path | None = None
    device: str | None = None
    #: Held while a chunk is made: weights are one thread's at a time.
    lock: Any = field(default_factory=RLock)

    def __post_init__(self) -> None:
        path, device = self.folder or shipped_folder(), self.device or default_device()
        self.pipeline = load_pipeline(path, torch.float32 if device == "cpu" else torch.bfloat16, device)
        taken = call_signature(type(self.pipeline)).parameters.values()
        if lacking := [each.name for each in taken if each.default is each.empty and each.name != "prompt"]:
            raise InvalidOptionError(
                f"{type(self.pipeline).__name__} wants {' and '.join(lacking)} beside a prompt, which the page has no "
                "box for; give a text-to-video pipeline, or use kvpack generate --begin"
            )
        self.pipeline.set_progress_bar_config(disable=True)
        self.scale = timing(path)[1]
        self._traces = TemporaryDirectory(prefix="kvpack-ui-")  # removed with the model
        self._count = 0

    @property
    def own(self) -> str:
        """Name of the memory that the model was trained for."""
        return (Settings.of_folder(self.folder or shipped_folder()) or Settings()).stack

    def begin(self, memory: str, prompt: str, seconds: float, seed: int) -> Video:
        """Begin a video with a memory such as "packforcing:topk=4"; one of 0 seconds is without end.

        Raises:
            KVPackError: if something is wrong.
        """
        named = parse_compared(memory)
        if len(named) != 1:
            raise InvalidOptionError(f"give one memory, e.g. packforcing or packforcing:topk=4, got {memory!r}")
        ((name, options),) = named
        generator = torch.Generator("cpu").manual_seed(require_seed(seed))
        with self.lock:
            pipeline: Any = copy.copy(self.pipeline)
            if self.folder is None:
                pipeline.enable_packforcing(demo_stack(name, **options))
            else:
                pipeline.enable_packforcing(name, **options)
            fps = pipeline.packforcing.fps
            length = {} if not seconds else {"num_frames": video_frames(seconds, fps, self.scale)[0]}
            stream = pipeline.packforcing.stream(prompt=prompt, generator=generator, output_type="np", **length)
            return Video(memory, pipeline, stream, self._trace(), prompts=[(0.0, prompt)])

    def resume(self, folder: Path) -> Video:
        """Go on with a video that was saved.

        Raises:
            SnapshotError: if there is none, or it is another model's.
        """
        pipeline: Any = copy.copy(self.pipeline)
        pipeline.enable_packforcing(saved_stack(folder))
        stream = pipeline.packforcing.resume(folder)
        note = stream.note if isinstance(stream.note, dict) else {}
        label, frames = str(note.get("label", pipeline.packforcing.stack.name)), int(note.get("frames", 0))
        return Video(label, pipeline, stream, self._trace(), frames=frames, first=frames)

    def fork(self, video: Video, seed: int, prompt: str | None) -> Video:
        """Return another future of a video, with other noise and, if one is given, another prompt."""
        stream = video.stream.fork(seed=seed, prompt=prompt)
        label = f"{video.label}, forked with seed {seed}"
        return Video(label, video.pipeline, stream, self._trace(), frames=video.frames, first=video.frames)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words that the tiny model has never seen; of other models nobody knows."""
        return [] if self.folder else unknown_words(self.pipeline.tokenizer, prompt)

    def _trace(self) -> Path:
        self._count += 1
        return Path(self._traces.name) / f"{self._count}.jsonl"
