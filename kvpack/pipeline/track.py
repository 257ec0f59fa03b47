"""A video while it is generated, for the command line: frames, speed and what its memory holds."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvpack.checkpoints.config import require_model_folder
from kvpack.errors import InvalidOptionError, KVPackError, first_line
from kvpack.media.video import Frames, as_bytes
from kvpack.memory.base import Memory
from kvpack.pipeline.enable import enable
from kvpack.planning.budget import Choice


@dataclass
class Track:
    """One generation, a chunk at a time.

    Args:
        pipeline: an enabled pipeline.
        stack: its policy.
        chunks: chunks that it will make.
        stream: yields their frames.
        frames: pixel frames so far.
        chunk_seconds: time that each chunk took, decoding included.
        before: chunks that were there when it was resumed.
    """

    pipeline: Any
    stack: Memory
    chunks: int
    stream: Iterator[Any]
    frames: int = 0
    chunk_seconds: list[float] = field(default_factory=list)
    before: int = 0

    def next_frames(self) -> Frames | None:
        """Return the next chunk's frames, `[frames, height, width, 3]`; None behind the last one."""
        start = time.perf_counter()
        chunk = next(self.stream, None)
        if chunk is None:
            return None
        self.chunk_seconds.append(time.perf_counter() - start)
        self.frames += chunk.shape[1]
        return as_bytes(chunk[0])  # the command line makes one video

    @property
    def done(self) -> int:
        """Chunks of the video that are there."""
        return self.before + len(self.chunk_seconds)

    @property
    def choice(self) -> Choice | None:
        """What a budget chose; None without one."""
        return self.pipeline.packforcing.choice

    @property
    def stats(self) -> dict[str, Any]:
        """What the memory holds; choices of blocks are left out."""
        return {key: value for key, value in self.pipeline.packforcing.stats().items() if key != "selected"}

    @property
    def frames_per_second(self) -> float:
        """Pixel frames generated in a second of this track's own time."""
        return self.frames / max(sum(self.chunk_seconds), 1e-9)

    def report(self) -> dict[str, Any]:
        """Return plain data, as JSON takes it."""
        chosen = {} if self.choice is None else {"budget": str(self.choice).splitlines()}
        return {
            "stack": self.stack.to_dict(),
            **chosen,
            "frames": self.frames,
            "generation_seconds": sum(self.chunk_seconds),
            "frames_per_second": self.frames_per_second,
            "chunk_seconds": self.chunk_seconds,
            "stats": self.stats,
        }


def load_pipeline(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Return a diffusers pipeline from its folder; the network is never asked.

    Raises:
        InvalidOptionError: if the folder does not hold one, or the device is not there.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    require_model_folder(folder)
    try:
        place = torch.device(device)
        torch.empty(0, device=place).cpu()  # what has no values, as meta, cannot be read
    except Exception as error:  # what torch raises depends on the kind of device
        raise InvalidOptionError(f"no device {device!r} here ({first_line(error)}); cpu always works") from error
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:  # whatever a broken file raises in diffusers, transformers or safetensors
        raise InvalidOptionError(f"{folder} does not load as a diffusers pipeline: {first_line(error)}") from error
    return pipeline.to(place)


@contextmanager
def started(
    pipeline: Any, stack: Memory | None, frames: int, seed: int, arguments: Mapping[str, Any]
) -> Iterator[Track]:
    """Start a generation, and frees what it holds at the end.

    Args:
        pipeline: a pipeline that an installed adapter supports.
        stack: its memory; None leaves it enabled as it is.
        frames: pixel frames.
        seed: of the noise, which is drawn on the CPU, the same on every device.
        arguments: further arguments of the pipeline's call.

    Raises:
        InvalidOptionError: if the pipeline refuses an argument.
    """
    if stack is not None:
        enable(pipeline, stack)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    given = {"num_frames": frames, "generator": generator, "output_type": "np", **arguments}
    try:
        stream = pipeline.packforcing.stream(**given)
    except KVPackError:
        raise
    except (TypeError, ValueError) as error:  # what stock checks raise
        raise InvalidOptionError(f"{type(pipeline).__name__} refuses the call: {first_line(error)}") from error
    memory: Memory = pipeline.packforcing.stack
    try:
        yield Track(pipeline, memory, stream.chunks or 0, stream)
    finally:
        stream.close()
