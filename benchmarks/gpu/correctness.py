"""Whether the device computes what a CPU does: a small model, the same inputs in every chunk, three dtypes.

Inputs are given to every forward, so that a difference is that of this chunk's memory and does not feed itself. The
yardstick is the error that the same dtype makes on a CPU, both against float32 there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import one
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.video import BRANCH, pipeline
from benchmarks.report import SEED, Row
from kvpack.adapters.wan.adapter import WanAdapter
from kvpack.adapters.wan.denoiser import WanDenoiser
from kvpack.adapters.wan.prompt_cache import PromptCache
from kvpack.plugins.registry import registry
from kvpack.testing.pipelines import tiny_wan_transformer

CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "text_dim": 64,
    "freq_dim": 32,
    "ffn_dim": 256,
    "num_layers": 3,
}
SIDE, CHUNKS, TEXT = 64, 8, 8
#: Blocks are chosen by age and tokens by lot, since a rounding may turn a close choice by score around.
_PACKED = {"topk": 2, "selector": "recency", "compressor": "keep-random", "keep_tokens": 0.5}
MEMORIES: dict[str, tuple[str, dict[str, Any]]] = {
    "packforcing": ("packforcing", _PACKED),
    "packforcing, int8": ("packforcing", {**_PACKED, "store": "int8"}),
    "packforcing, host": ("packforcing", {**_PACKED, "tier": "host"}),
    "self-forcing": ("self-forcing", {}),
}
ERROR, TWICE = "error / error of a CPU", 2.0
#: Archives whose keys choose, each on the device and in the memory of the host.
TIERS: dict[str, dict[str, Any]] = {store: {"topk": 2, "store": store} for store in ("dense", "int8")}
APART = "greatest difference between tiers"
EXACT, EXACT_AT_MOST = "error of the device in float32", 1e-4


def outputs(
    memory: tuple[str, dict[str, Any]], device: torch.device, dtype: torch.dtype, compiled: str = "", rows: int = 1
) -> Tensor:
    """Return what the model puts out in the last step of every chunk, `[chunks * rows, channels, frames, h, w]`.

    Args:
        memory: its name and options.
        device: where.
        dtype: of the model.
        compiled: backend of `torch.compile`; empty does not compile.
        rows: videos of the batch.
    """
    name, options = memory
    model = tiny_wan_transformer(SEED, **CONFIG).requires_grad_(False)  # the same weights everywhere
    pipe = pipeline(torch.nn.Module.to(model, device, dtype))
    if compiled:
        model.compile_repeated_blocks(fullgraph=True, backend=compiled)
    adapter, stack = WanAdapter(), registry().stack(name, options)
    geometry = adapter.geometry(adapter.configs(pipe), SIDE, SIDE, dtype)
    draw = torch.Generator().manual_seed(SEED)
    text = torch.randn(rows, TEXT, CONFIG["text_dim"], generator=draw).to(device, dtype)
    denoiser = WanDenoiser(pipe, stack, geometry, {BRANCH: text}, prompt=PromptCache())
    made = []
    with torch.no_grad(), denoiser.seam():
        for _ in range(CHUNKS):
            chunk = torch.randn(rows, 16, stack.chunk_frames, SIDE // 8, SIDE // 8, generator=draw).to(device, dtype)
            for step, time in enumerate((900.0, 400.0)):
                out = denoiser.predict(BRANCH, chunk, torch.full((rows,), time, device=device), step)
            made.append(out.float().cpu())
            denoiser.commit(chunk, None)
    return torch.cat(made)


def error(given: Tensor, wanted: Tensor) -> float:
    """Return the relative error of the last chunk, which attends whatever the memory has of those before."""
    return float((given[-1] - wanted[-1]).norm() / wanted[-1].norm())


def rows_of(machine: Machine, rows: list[Row], compiled: str = "") -> str | None:
    """Append the errors of every memory, and say which are too large.

    Args:
        machine: the device.
        rows: what is measured so far.
        compiled: backend of `torch.compile`; empty does not compile.
    """
    wrong, cpu = [], torch.device("cpu")
    suffix = ", compiled" if compiled else ""
    for name, memory in MEMORIES.items():
        exact = outputs(memory, cpu, torch.float32)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            apart = error(outputs(memory, machine.device, torch.float32, compiled), exact)
        rows.append(one(f"{name}, float32{suffix}", EXACT, apart, "ratio"))
        if not apart <= EXACT_AT_MOST:
            wrong.append(f"{name}, float32{suffix}")
        for dtype in (torch.bfloat16, torch.float16):
            subject = f"{name}, {str(dtype).removeprefix('torch.')}{suffix}"
            usual = error(outputs(memory, cpu, dtype), exact)
            found = error(outputs(memory, machine.device, dtype, compiled), exact)
            rows += [
                one(subject, "error of a CPU against float32", usual, "ratio"),
                one(subject, "error of the device against float32", found, "ratio"),
                one(subject, ERROR, found / usual, "ratio"),
            ]
            if not found <= TWICE * usual:
                wrong.append(subject)
        if compiled:
            break
    return f"WRONG, far more than a CPU's error: {', '.join(wrong)}" if wrong else None


def tiers(machine: Machine, rows: list[Row]) -> str | None:
    """Append how far outputs of an archive elsewhere are from those of one on the device, and say which are."""
    wrong = []
    for store, options in TIERS.items():
        for videos, dtype in ((1, torch.bfloat16), (1, torch.float32), (2, torch.bfloat16)):
            beside, *others = (
                outputs(("packforcing", {**options, "tier": tier}), machine.device, dtype, rows=videos)
                for tier in ("device", "host", "disk")
            )
            for tier, found in zip(("host", "disk"), others, strict=True):
                subject = f"packforcing, {store}, {tier}, {str(dtype).removeprefix('torch.')}, batch {videos}"
                rows.append(one(subject, APART, float((beside - found).abs().max()), ""))
                if not torch.equal(beside, found):
                    wrong.append(subject)
    return f"WRONG, the tiers differ: {', '.join(wrong)}" if wrong else None
