"""Triton kernels and what is done without them, what the card can do at best, and each attention backend."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from benchmarks.gpu.bench import OutOfTime, one
from benchmarks.gpu.machine import Machine, milliseconds
from benchmarks.gpu.video import Size, Video, pipeline
from benchmarks.report import SEED, Row, samples
from kvpack.memory import fetching, rope
from kvpack.memory.geometry import Geometry
from kvpack.memory.rope import rotate, rotations

#: Not for this machine, fetched from the Hub, or a matrix of all scores.
_NOT_HERE = ("npu", "xla", "hub", "aiter", "math", "varlen")
USUAL = "native"


def limits(machine: Machine, rows: list[Row], size: Size) -> None:
    """Append what a copy and a product of matrices reach, to which the other figures can be held."""
    side = 8192 if machine.cuda else 256
    a = torch.randn(side, side, device=machine.device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    product = machine.median(partial(torch.mm, a, a, out=out), 5, warm=3)
    large = torch.empty(2**30 if machine.cuda else 2**20, dtype=torch.uint8, device=machine.device)
    copy = machine.median(partial(torch.empty_like(large).copy_, large), 5, warm=2)
    rows += [
        one("the card", "bfloat16 product of matrices", 2 * side**3 / product / 1e12, "TFLOP/s"),
        one("the card", "copy, bytes read and written", 2 * large.nbytes / copy / 1e9, "GB/s"),
    ]
    if machine.cuda:
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        fetch = machine.median(partial(large[: 2**28].copy_, host, non_blocking=True), 5, warm=2)
        rows.append(one("the card", "copy from pinned host memory", host.nbytes / fetch / 1e9, "GB/s"))


def rotation(machine: Machine, rows: list[Row], size: Size, tokens: int) -> str | None:
    """Append the rotation of one layer's attended keys, with the kernel and without it, and how far they are apart."""
    heads, head_dim = size.transformer["num_attention_heads"], size.transformer["attention_head_dim"]
    side = 2 * (head_dim // 6)
    geometry = Geometry(1, heads, head_dim, (1, 1), (head_dim - 2 * side, side, side))
    places = torch.rand(1, tokens, 3, device=machine.device) * 50
    turns, generator = rotations(places, geometry), torch.Generator(machine.device).manual_seed(SEED)
    shape, worst = (1, tokens, heads, head_dim), 0.0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        keys = torch.randn(shape, device=machine.device, generator=generator).to(dtype)
        found = {}
        for name in ("eager", "kernel") if machine.cuda and rope._kernel(machine.device) is not None else ("eager",):
            out = torch.empty_like(keys)
            # `_kernel` gives None where Triton is not there.
            with patch.object(rope, "_kernel", rope._kernel if name == "kernel" else lambda device: None):
                spent = machine.each(partial(rotate, keys, turns, out), 10, warm=3)
            subject = f"rotate {tokens:,} keys, {name}, {str(dtype).removeprefix('torch.')}"
            rows.append(samples(subject, "time", milliseconds(spent), "ms"))
            rows.append(one(subject, "bytes / s", 2 * keys.nbytes / min(spent) / 1e9, "GB/s"))
            found[name] = out.float()
        if len(found) == 2:
            # Both compute in float32 and round once: at most one unit in the last place apart.
            apart = float(((found["kernel"] - found["eager"]).abs() / keys.float().abs().amax()).max())
            rows.append(one(subject, "kernel - eager, of the largest key", apart, "ratio"))
            worst = max(worst, apart / torch.finfo(dtype).eps)
    return f"WRONG: the kernel is {worst:.1f} units off" if worst > 2 else None


def gathering(machine: Machine, rows: list[Row]) -> str | None:
    """Append how fast chosen slots come from pinned memory, by copies of the host and by the kernel."""
    kernel = fetching._kernel(machine.device) if machine.cuda else None
    if kernel is None:
        return "only CUDA with Triton reads pinned memory by itself"
    pinned = torch.randint(256, (128, 182 * 12 * 128 * 2), dtype=torch.uint8).pin_memory()  # keys at 832x480
    chosen = torch.arange(127, 0, -8, device=machine.device)
    ways = {
        "copies": lambda: fetching.fetched(pinned[None], [chosen.tolist()], machine.device),
        "the kernel": partial(kernel, pinned, chosen),
    }
    for name, way in ways.items():
        took = machine.each(way, 10, warm=3)
        rows.append(samples(f"16 slots of pinned memory, {name}", "time", milliseconds(took), "ms"))
    same = torch.equal(*(way() for way in ways.values()))
    return None if same else "WRONG: the kernel reads other bits"


def backends(machine: Machine, rows: list[Row], size: Size, model: Any) -> str:
    """Append a denoising forward with each attention backend of diffusers that is there; say which are not."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    absent = []
    video = Video(pipeline(model), machine, size, "packforcing")
    try:
        video.fill()
        for name in (each.value for each in AttentionBackendName):
            if any(part in name for part in _NOT_HERE):
                continue
            try:
                model.set_attention_backend(name)
                with torch.no_grad(), video.denoiser.seam():
                    video.denoise(0)
                    spent = machine.each(partial(video.denoise, 1), size.times)
                rows.append(samples(f"attention backend {name}", "forward through kvpack", milliseconds(spent), "ms"))
            except OutOfTime:
                raise
            except Exception as error:  # a backend that is not installed, or not for this card
                absent.append(f"{name} ({str(error).strip().splitlines()[0][:60] or type(error).__name__})")
    finally:
        model.set_attention_backend(USUAL)
        video.close()
    return f"not there: {', '.join(absent)}" if absent else ""
