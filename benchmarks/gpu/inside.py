"""What kvpack does inside a forward: waits for the device, and allocations beyond those of the bare transformer."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.bench import one
from benchmarks.gpu.generation import WAITS
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.video import STEPS, Size, Video, pipeline
from benchmarks.report import Row


def waits_and_allocations(machine: Machine, rows: list[Row], size: Size, model: Any) -> str | None:
    """Append waits of a chunk's forwards and of its commit, and tensors allocated a layer and forward."""
    if not machine.cuda:
        return "only CUDA counts waits and allocations; tests count them on a CPU"
    video = Video(pipeline(model), machine, size, "packforcing")
    try:
        video.fill()
        with torch.no_grad():
            _counted(rows, video)
    finally:
        video.close()
    return None


def _counted(rows: list[Row], video: Video) -> None:
    layers, machine = video.session.geometry.layers, video.machine
    held = video.held()
    with video.denoiser.seam():
        for step in range(STEPS):
            video.denoise(step)
        video.commit()
        forwards = machine.waits(lambda: [video.denoise(step) for step in range(STEPS)])
        rows.append(one("packforcing", WAITS, forwards, "waits"))
        rows.append(one("packforcing", "waits in its commit", machine.waits(video.commit), "waits"))
        video.denoise(0)
        through = _allocated(machine, lambda: video.denoise(1))
    with video.bare(held):
        video.denoise(1)
        bare = _allocated(machine, lambda: video.denoise(1))
    if through is not None and bare is not None:
        more = (through - bare) / layers
        rows.append(one("packforcing", "allocations a layer and later step, beyond the bare transformer's", more, ""))


def _allocated(machine: Machine, call: Any) -> int | None:
    """Return how many tensors' memory was taken from torch's allocator."""
    before = machine.counter("allocation.all.allocated")
    call()
    after = machine.counter("allocation.all.allocated")
    return None if before is None or after is None else after - before
