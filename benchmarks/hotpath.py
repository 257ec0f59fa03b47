"""What kvpack launches, moves and allocates in a denoising step of Wan2.1-1.3B at 832x480 in bfloat16, counted.

One layer, behind a full context, on tensors without numbers (`device="meta"`), which stand for a device: what goes
from the host to them is seen. Attention does nothing. A rotation counts as what it is on CUDA: one kernel that reads
vectors and angles and writes vectors. Deterministic, one sample each; no time is measured.

later step        a denoising forward behind a chunk's first one, in which another layer has had the workspace: what
                  3 of 4 forwards are
first step        a chunk's first forward: blocks are chosen, placed and gathered
commit            the clean chunk's forward, and what then becomes of it
whole chunk       a first step, three later ones and the commit

operators         kernels launched a layer; views launch none
allocations       new tensors a layer
moved             bytes read and written
moved / needed    over those that no way of rotating on read can spare: history's keys, and the chunk's keys and values,
                  read and written once; queries, which the transformer rotates anyway, on both sides
copies to device  a chunk's first step and all layers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.flashdreams import IDLE
from benchmarks.report import Bar, Row, samples, script
from kvpack import Geometry, Session
from kvpack.memory import attended, session
from kvpack.memory.rope import rotate
from kvpack.plugins.registry import registry

META = torch.device("meta")
WAN = Geometry(1, 12, 128, (30, 52), (44, 42, 42), dtype=torch.bfloat16)
SMALL = Geometry(1, 2, 12, (4, 6), (4, 4, 4), dtype=torch.bfloat16)
#: Chunks after which each of them attends as many tokens as the last, and the archive is full.
CHUNKS = 134
MEMORIES: dict[str, tuple[str, dict[str, Any]]] = {
    "packforcing": ("packforcing", {}),
    "int8, packforcing": ("packforcing", {"store": "int8"}),
    "self-forcing": ("self-forcing", {}),
    "streaming-llm": ("streaming-llm", {}),
    "deep-forcing": ("deep-forcing", {}),
}
LATER, FIRST, COMMIT, CHUNK = "later step", "first step", "commit", "whole chunk"
OPERATORS, ALLOCATIONS, MOVED, NEEDED = "operators", "allocations", "moved", "moved / needed"
SENT = "copies to the device"
BARS = (
    Bar("a later step launches few kernels a layer", "packforcing", f"{LATER}: {OPERATORS}", 6, timed=False),
    Bar("a later step of a plain window launches fewer", "self-forcing", f"{LATER}: {OPERATORS}", 3, timed=False),
    Bar("nothing is allocated but the rotated queries", "packforcing", f"{LATER}: {ALLOCATIONS}", 1, timed=False),
    Bar("a later step moves what it must", "packforcing", f"{LATER}: {NEEDED}", 1.1),
    Bar("in int8 it decodes keys of chosen blocks too", "int8", f"{LATER}: {OPERATORS}", 14, timed=False),
    Bar("and moves half as much again", "int8", f"{LATER}: {NEEDED}", 1.55),
    Bar("a later step sends nothing to the device", "", f"{LATER}: {SENT}", 0, timed=False),
)


@dataclass
class Counts:
    """What was done.

    Args:
        names: operators, in order.
        allocations: tensors made that share no memory with an argument.
        moved: bytes read and written.
        sent: copies from the host to the device.
    """

    names: list[str] = field(default_factory=list)
    allocations: int = 0
    moved: int = 0
    sent: int = 0


class Counter(TorchDispatchMode):
    """Counts operators, and what they read, write and allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.quiet = Counts(), False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.quiet or func.is_view:
            return result
        name, counts = func._schema.name.split("::")[1], self.counts
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        held = {each.untyped_storage()._cdata for each in given}
        if any(each.device == META for each in made):
            counts.allocations += sum(each.untyped_storage()._cdata not in held for each in made)
            counts.sent += any(each.device != META and each.ndim for each in given)
        if not name.startswith(IDLE) and any(each.device == META for each in (*given, *made)):
            counts.names.append(name)
            targets = {id((kwargs or {}).get("out"))} | (
                {id(args[0])} if name in ("copy_", "fill_", "zero_") else set()
            )
            counts.moved += sum(each.nbytes for each in given if id(each) not in targets)
            counts.moved += sum(each.nbytes for each in made)
        return result

    def rotated(self, vectors: Tensor, turns: Tensor, out: Tensor | None = None) -> Tensor:
        """Count a rotation as one kernel."""
        counts, self.quiet = self.counts, True
        try:
            made = rotate(vectors, turns, out)
        finally:
            self.quiet = False
        counts.names.append("rotate")
        counts.allocations += out is None
        counts.moved += vectors.nbytes + turns.nbytes + made.nbytes
        return made

    def tensor(self, real: Callable[..., Tensor], *given: Any, **options: Any) -> Tensor:
        """Count a tensor that is made of numbers of the host."""
        self.counts.sent += options.get("device") == META
        return real(*given, **options)

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Count what is done in the block."""
        self.counts = Counts()
        real = torch.tensor

        def tensor(*given: Any, **options: Any) -> Tensor:
            return self.tensor(real, *given, **options)

        with self, patch.object(attended, "rotate", self.rotated), patch.object(torch, "tensor", tensor):
            yield self.counts


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Stand in for attention."""
    return queries


def counted(memory: str, options: dict[str, Any], shape: Geometry, chunks: int = CHUNKS) -> dict[str, Counts]:
    """Return what the last of some chunks does, by the kind of forward; `later step` twice must be the same."""
    stack = registry().stack(memory, options)
    driven, counter, found = Session(stack, shape), Counter(), {}
    tokens = stack.chunk_frames * shape.tokens_per_frame
    size = 3, 1, tokens, shape.heads, shape.head_dim

    def forward(layers: Any, projected: Tensor) -> None:
        driven.workspace.owner = None  # another layer has had it
        for layer in layers:
            layer.attend(*projected, attention)

    # What is looked at once a chunk for errors are numbers, of which there are none here.
    with torch.no_grad(), patch.object(session, "check_layers", lambda caches: True):
        for _ in range(chunks):
            for name, step in ((FIRST, 0), (LATER, 1), (f"{LATER} again", 2)):
                projected = torch.empty(size, dtype=shape.dtype, device=META)
                with counter.counting() as found[name]:
                    forward(driven.denoise(step), projected)
            projected = torch.empty(size, dtype=shape.dtype, device=META)
            with counter.counting() as found[COMMIT]:
                forward(driven.commit(), projected)
                driven.finish_commit()
    return found


def needed(memory: str, options: dict[str, Any], shape: Geometry, chunks: int = CHUNKS) -> int:
    """Return the bytes that a later step must read and write, where keys are rotated into one place for all layers."""
    from kvpack.planning.planner import plan

    stack = registry().stack(memory, options)
    chunk = stack.chunk_frames * shape.tokens_per_frame
    history = plan(shape, stack, chunks * stack.chunk_frames).attended_tokens - chunk
    rotated = 0 if stack.keeps_rotated else history
    copied = 0 if stack.in_place else history  # what does not lie in place is copied, values too
    return 2 * (rotated + copied + 3 * chunk) * shape.width * shape.dtype.itemsize


def rows_of(name: str, shape: Geometry, chunks: int) -> list[Row]:
    """Return the figures of one memory."""
    memory, options = MEMORIES[name]
    found = counted(memory, options, shape, chunks)
    if found[LATER] != found.pop(f"{LATER} again"):
        raise RuntimeError(f"{name}: two later steps of one chunk did not do the same")
    rows = []
    for kind, counts in found.items():
        figures = {
            OPERATORS: len(counts.names),
            ALLOCATIONS: counts.allocations,
            MOVED: counts.moved,
            SENT: counts.sent,
        }
        units = {MOVED: "bytes"}
        rows += [
            samples(name, f"{kind}: {each}", [float(value)], units.get(each, "count"))
            for each, value in figures.items()
        ]
    chunk = [found[FIRST], *[found[LATER]] * 3, found[COMMIT]]
    rows += [
        samples(name, f"{CHUNK}: {OPERATORS}", [float(sum(len(each.names) for each in chunk))], "count"),
        samples(name, f"{CHUNK}: {MOVED}", [float(sum(each.moved for each in chunk))], "bytes"),
    ]
    ratio = found[LATER].moved / needed(memory, options, shape, chunks)
    return [*rows, samples(name, f"{LATER}: {NEEDED}", [ratio], "ratio")]


def run(small: bool = False) -> list[Row]:
    """Count all memories."""
    shape = SMALL if small else WAN
    return [row for name in MEMORIES for row in rows_of(name, shape, 24 if small else CHUNKS)]


if __name__ == "__main__":
    script("hotpath", __doc__, run, BARS)
