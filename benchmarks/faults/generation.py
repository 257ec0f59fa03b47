"""The generation that faults are done to, and whether it goes on as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.tally import Tally
from benchmarks.report import SEED
from kvpack.snapshots.folder import SnapshotFolder
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


class Faults:
    """The generation, what it makes when nothing happens, and how often a fault is tried."""

    def __init__(self, folder: Path, small: bool) -> None:
        self.folder, self.small, self.draw = folder, small, random.Random(SEED)
        self.call = {**CALL, "num_frames": 53} if small else CALL
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
        return self.pipe.packforcing.stream(**{**self.call, "generator": generator, **changed})

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
            saved = SnapshotFolder(folder).chunks()
            rest = list(made().packforcing.resume(folder, **(given or {})))
        tally.survived += 1
        tally.resumed += 1
        tally.identical += len(self.whole) - len(rest) in saved and ends_with(self.whole, rest)

    @contextmanager
    def new_folder(self) -> Iterator[Path]:
        """Give an empty folder, removed afterwards."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        yield folder
        shutil.rmtree(folder)


def made() -> Any:
    """Return another pipeline with the same weights, enabled."""
    pipe = tiny_wan_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe.enable_packforcing("packforcing", **SIZES)


def ends_with(whole: list[Any], rest: list[Any]) -> bool:
    """Whether the last of some frames are the very bits of others."""
    return all(torch.equal(a, b) for a, b in zip(whole[len(whole) - len(rest) :], rest, strict=True))


def is_stock(pipe: Any) -> bool:
    """Return whether nothing of kvpack is left in a transformer between two calls."""
    transformer = pipe.transformer
    return (
        all(type(block.attn1.processor).__name__ == "WanAttnProcessor" for block in transformer.blocks)
        and not transformer._forward_pre_hooks
        and not transformer.patch_embedding._forward_hooks
    )
