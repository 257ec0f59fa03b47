"""kvpack beside what other projects do with keys and values, written anew from their descriptions, on the same tensors.

One layer of Wan2.1-1.3B at 832x480. A chunk is 4 denoising forwards and the commit's, without attention: what is
measured is the memory's handling alone, behind a full context. Nobody's code is run or copied.

shift          Self-Forcing (arXiv 2506.08009): a buffer of 21 frames whose keys are kept rotated; a chunk that does
               not fit shifts it through a clone. kvpack: `self-forcing`, window 21, no sink
concatenate    PackForcing-Unofficial: sink of 9 frames, 16 compressed blocks of 273 tokens, 6 recent frames, chunks of
               3. In every forward all blocks are concatenated, the whole is cloned, and each block's keys, which are
               kept rotated, are turned on in float64 to places counted back from the chunk. kvpack: `packforcing` of
               the same sizes, keys before RoPE, the same places but for a shift of all
reconstruct    KIVI (arXiv 2402.02750) as it is used for video: archived blocks in int4, all of which are decoded in
               every forward, beside everything else, into a buffer as long as the history. kvpack: `packforcing` with
               `store="int4"`, which decodes the 16 of 128 blocks that it attends: values once a chunk, keys where they
               are rotated

Both sides rotate by the same function, but where the rival's way is float64; the rivals' angles are made before the
clock starts, kvpack's are counted. Both compress by taking the same tokens. Queries are rotated on neither side's
account.

chunk       CPU seconds of a chunk in one thread, taken in turns: median, least and greatest
moved       bytes of all operands that the chunk's operators read and write
to memory   bytes of them that pass a cache of 8 MiB (see `benchmarks.cached`): kvpack widens keys a few at a time
as kernels  moved, where a rotation by that function is one kernel that reads and writes once, as it is on CUDA
peak        bytes held between two chunks, and the most that a chunk makes on top of them
/ rival     below 1 kvpack is ahead
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.cached import Cached
from benchmarks.flashdreams import Kvpack, Moved, Projections, geometry, no_queries
from benchmarks.report import SEED, Bar, Row, samples, say, script
from benchmarks.rival_memories import (
    ARCHIVED,
    FRAMES,
    KEPT,
    MID,
    RECENT,
    SINK,
    WINDOW,
    Concatenate,
    Reconstruct,
    Rival,
    Shift,
)
from kvpack import Geometry, Session
from kvpack.memory import attended
from kvpack.memory.rope import rotate
from kvpack.memory.stack import Stack
from kvpack.plugins.registry import registry
from kvpack.policies.keep_grid import GridCompressor

TIME, MOVED, MEMORY, KERNELS, PEAK = (
    f"{each} / rival" for each in ("chunk", "moved", "to memory", "as kernels", "peak")
)
HELD = "peak / the same tokens held densely"
BARS = (
    Bar("5 times less time than concatenate", "kvpack, concatenate", TIME, 0.2),
    Bar("5 times fewer bytes than concatenate, fp32", "kvpack, concatenate, fp32", MOVED, 0.2),
    Bar("5 times fewer bytes than concatenate, bf16", "kvpack, concatenate, bf16", MOVED, 0.2),
    Bar("5 times fewer bytes to and from memory", "kvpack, concatenate", MEMORY, 0.2),
    Bar("5 times fewer bytes as CUDA kernels", "kvpack, concatenate", KERNELS, 0.2),
    Bar("no more time than shift", "kvpack, shift", TIME, 1.0),
    Bar("no more bytes than shift", "kvpack, shift", MOVED, 1.0),
    Bar("no more time than reconstruct", "kvpack, reconstruct", TIME, 1.0),
    Bar("no higher a peak than reconstruct", "kvpack, reconstruct", PEAK, 1.0),
)


class AsKernels(Moved):
    """Counts rotations by kvpack's function as one kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.quiet:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def rotated(self, vectors: Tensor, turns: Tensor, out: Tensor | None = None) -> Tensor:
        """Count what the kernel reads and writes."""
        self.quiet = True
        made = rotate(vectors, turns, out)
        self.quiet = False
        self.nbytes += vectors.nbytes + turns.nbytes + made.nbytes
        return made


class Extra(Moved):
    """The most bytes of new tensors that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in given:
                self._count(each.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class Mine(Kvpack):
    """kvpack's side, of any memory."""

    def __init__(self, memory: Stack, shape: Geometry) -> None:
        self.session = Session(memory, shape)
        self.attended: tuple[Tensor, Tensor] | None = None

    def fill(self, projected: Projections) -> None:
        """Make a chunk history, before anything is measured."""
        (layer,) = self.session.commit()
        layer.attend(*projected, self.hold)
        self.session.finish_commit()


def mine(rival: str, shape: Geometry) -> Mine:
    """Return kvpack's memory beside a rival's."""
    grid = {"compressor": "keep-grid", "selector": "recency", "reindexer": "contiguous"}
    name, options = {
        "shift": (
            "self-forcing",
            {"chunk_frames": FRAMES, "window_frames": WINDOW, "sink_frames": 0, "reindexer": "absolute"},
        ),
        "concatenate": (
            "packforcing",
            {"chunk_frames": FRAMES, "sink_frames": SINK, "recent_frames": RECENT, "topk": MID}
            | {"archive_blocks": MID, "keep_tokens": KEPT, **grid},
        ),
        "reconstruct": ("packforcing", {"topk": MID, "archive_blocks": ARCHIVED, "store": "int4", **grid}),
    }[rival]
    return Mine(registry().stack(name, options), shape)  # type: ignore[arg-type]


RIVALS: dict[str, tuple[Callable[[Geometry], Rival], int]] = {
    "shift": (Shift, WINDOW // FRAMES + 1),
    "concatenate": (Concatenate, (SINK + RECENT) // FRAMES + MID + 1),
    "reconstruct": (Reconstruct, 3 + ARCHIVED + 1),
}


def projections(shape: Geometry, frames: int, chunk: int) -> Projections:
    """Return queries that nobody reads, and keys and values of a chunk."""
    generator = torch.Generator().manual_seed(SEED + chunk)
    size = 1, frames * shape.tokens_per_frame, shape.heads, shape.head_dim
    keys, values = (torch.randn(size, generator=generator).to(shape.dtype) for _ in range(2))
    return keys, keys, values


def pair(rival: str, shape: Geometry, name: str, chunks: int) -> list[Row]:
    """Return the figures of both sides behind a full context."""
    say(f"rivals: {rival}, {name}")
    make, full = RIVALS[rival]
    sides: dict[str, Any] = {"kvpack": mine(rival, shape), "rival": make(shape)}
    frames = sides["kvpack"].session.stack.chunk_frames
    spent: dict[str, list[float]] = {side: [] for side in sides}
    counts: dict[str, dict[str, float]] = {side: {} for side in sides}
    for chunk in range(full):
        for memory in sides.values():
            memory.fill(projections(shape, frames, chunk))
    # One to warm up, and some of which only the time or only the operators are looked at.
    for chunk, kind in enumerate([None] * (1 + chunks) + [Moved, Cached, AsKernels, Extra]):
        projected = projections(shape, frames, full + chunk)
        for side, memory in sides.items():
            if side == "rival":
                memory.prepare()
            mode = kind() if kind else nullcontext()
            turn = mode.rotated if isinstance(mode, AsKernels) else rotate
            before, start = memory.resident(), time.process_time()
            with (
                patch.object(attended, "rotate", partial(_keys_only, turn)),
                patch.object(Rival, "rotate", staticmethod(turn)),
                mode,
            ):
                memory.chunk(projected)
            if kind is None and chunk:
                spent[side].append(time.process_time() - start)
            elif kind is not None:
                counts[side][kind.__name__] = before + mode.peak if kind is Extra else float(mode.nbytes)
    if rival != "reconstruct":
        check_same(sides, shape, rival)
    return [*_own_rows(sides, spent, counts, rival, name, shape), *_ratios(spent, counts, f"kvpack, {rival}, {name}")]


def _keys_only(turn: Callable[..., Tensor], vectors: Tensor, turns: Tensor, out: Tensor | None = None) -> Tensor:
    return no_queries(vectors, turns) if out is None else turn(vectors, turns, out)


def _own_rows(
    sides: dict[str, Any],
    spent: dict[str, list[float]],
    counts: dict[str, dict[str, float]],
    rival: str,
    name: str,
    shape: Geometry,
) -> list[Row]:
    rows = []
    for side, memory in sides.items():
        subject = f"{side}, {rival}, {name}"
        each = counts[side]
        rows += [
            samples(subject, "attended", [float(memory.attended[0].shape[1])], "tokens"),
            samples(subject, "chunk", [1e3 * seconds for seconds in spent[side]], "ms"),
            samples(subject, "moved", [each["Moved"]], "bytes"),
            samples(subject, "to memory", [each["Cached"]], "bytes"),
            samples(subject, "as kernels", [each["AsKernels"]], "bytes"),
            samples(subject, "held between chunks", [float(memory.resident())], "bytes"),
            samples(subject, "peak", [each["Extra"]], "bytes"),
        ]
        if rival == "reconstruct":
            span = GridCompressor().span(0, 4, shape.grid).tokens
            dense = (12 * shape.tokens_per_frame + ARCHIVED * span) * 2 * shape.width * shape.dtype.itemsize
            rows.append(samples(subject, HELD, [each["Extra"] / dense], "ratio"))
    return rows


def _ratios(spent: dict[str, list[float]], counts: dict[str, dict[str, float]], subject: str) -> list[Row]:
    turns = zip(spent["kvpack"], spent["rival"], strict=True)
    rows = [samples(subject, TIME, [mine / theirs for mine, theirs in turns], "ratio")]
    for metric, kind in ((MOVED, "Moved"), (MEMORY, "Cached"), (KERNELS, "AsKernels"), (PEAK, "Extra")):
        rows.append(samples(subject, metric, [counts["kvpack"][kind] / counts["rival"][kind]], "ratio"))
    return rows


def check_same(sides: dict[str, Any], shape: Geometry, rival: str) -> None:
    """Raise if the two sides attended other values, or other keys but for a shift of all and a rounding."""
    (keys, values), (other_keys, other_values) = sides["kvpack"].attended, sides["rival"].attended
    if rival == "concatenate":
        start = (SINK + RECENT + FRAMES * MID) - sides["rival"].anchor
        other_keys = sides["rival"].turned(other_keys.double(), start)
    away = float((keys.double() - other_keys.double()).abs().max())
    if not torch.equal(values, other_values) or away > 32 * torch.finfo(shape.dtype).eps:
        raise RuntimeError(f"{rival}: the two sides attended different keys (by {away:.1e}) or values")


@torch.no_grad()
def run(small: bool = False) -> list[Row]:
    """Measure every rival in fp32 and bf16, but for the one that takes long, in bf16 only."""
    rows = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for rival in RIVALS:
            if small or rival != "reconstruct" or dtype == torch.bfloat16:
                rows += pair(rival, geometry(small, dtype), name, 2 if small else 3)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    script("rivals", __doc__, run, BARS)
