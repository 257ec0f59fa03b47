"""kvpack's rolling window beside `BlockKVCache` of FlashDreams 0.1.0, at the size of one layer of Wan2.1-1.3B.

Both hold a window of 21 latent frames in chunks of 3, without a sink, and are given the same keys and values. A chunk
is 4 denoising forwards and the commit's, without attention: what is measured is the memory's handling alone.

absolute    keys are kept rotated to their places in the video (kvpack: `self-forcing` with reindexer="absolute")
on read     keys are kept before RoPE, and all of them are rotated in every forward (reindexer="contiguous"); kvpack's
            layer fills the shared workspace anew, as in a model of many layers. FlashDreams clones the keys and rotates
            the clone in place; "no clone" spares it that, and rotates into a new tensor

FlashDreams rotates with a Triton kernel; here both sides rotate with the same function on the CPU, and its angles are
made once, before the clock starts. kvpack's are made anew in each chunk and counted. Queries are rotated on neither
side's account.

chunk       CPU seconds of a chunk in the steady state, in one thread: median, least and greatest
moved       bytes that the chunk's copies and element-wise operations read and write
resident    bytes held between two chunks

Needs `pip install --no-deps flashdreams==0.1.0`; without it nothing is measured.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.report import SEED, Bar, Row, samples, say, script
from kvpack import Geometry, Session
from kvpack.memory import attended
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.rope import rotate, rotations
from kvpack.policies.stacks import self_forcing

WINDOW, CHUNK, STEPS = 21, 3, 4
CPU = torch.device("cpu")
ABSENT = "it is not installed (pip install --no-deps flashdreams==0.1.0)"
TIME, MOVED, RESIDENT = "chunk / FlashDreams", "moved / FlashDreams", "resident / FlashDreams"
BARS = (
    Bar("kvpack takes no longer", "kvpack", TIME, 1.0),
    Bar("kvpack moves no more bytes", "kvpack", MOVED, 1.0),
    Bar("kvpack holds no more bytes", "kvpack", RESIDENT, 1.0),
)
#: Operations beside views that touch no data.
IDLE = ("empty", "new_empty", "is_", "_local_scalar", "_unsafe_view", "_reshape_alias")
Projections = tuple[Tensor, Tensor, Tensor]


class Moved(TorchDispatchMode):
    """Counts the bytes of all tensors that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        touches = not func.is_view and not name.startswith(IDLE)
        if touches:
            # An argument that is written in place is also the result, and is read only if it is no copy's target.
            read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            targets = {id(kwargs["out"])} if kwargs and "out" in kwargs else set()
            targets |= {id(args[0])} if name in ("copy_", "fill_", "zero_") else set()
            written = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
            self.count([each for each in read if id(each) not in targets], written)
        return result

    def count(self, read: list[Tensor], written: list[Tensor]) -> None:
        """Count what one operation reads and writes."""
        self.nbytes += sum(each.nbytes for each in (*read, *written))


def flashdreams_cache() -> ModuleType | None:
    """Return the module of FlashDreams' cache alone, whose package needs more than this; None without it."""
    package = importlib.util.find_spec("flashdreams")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / "core" / "attention" / "kvcache.py"
    spec = importlib.util.spec_from_file_location("flashdreams_kvcache", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def geometry(small: bool, dtype: torch.dtype, layers: int = 1) -> Geometry:
    """Return layers of Wan2.1-1.3B, or tiny ones."""
    if small:
        return Geometry(layers, 2, 12, (4, 6), (4, 4, 4), dtype=dtype)
    return Geometry(layers, 12, 128, (30, 52), (44, 42, 42), dtype=dtype)


def projections(shape: Geometry, chunk: int, device: torch.device = CPU) -> Projections:
    """Return queries of no size, and the keys and values of a chunk, the same on both sides."""
    generator = torch.Generator().manual_seed(SEED + chunk)
    size = (1, CHUNK * shape.tokens_per_frame, shape.heads, shape.head_dim)
    keys, values = (torch.randn(size, generator=generator).to(device, shape.dtype) for _ in range(2))
    return keys, keys, values


class Kvpack:
    """kvpack's window; what was attended last is in `attended`."""

    def __init__(self, shape: Geometry, on_read: bool) -> None:
        stack = self_forcing(
            chunk_frames=CHUNK, window_frames=WINDOW, sink_frames=0, reindexer="contiguous" if on_read else "absolute"
        )
        self.session = Session(stack, shape)
        self.attended: tuple[Tensor, Tensor] | None = None

    def hold(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stand in for attention."""
        self.attended = keys, values
        return queries

    def chunk(self, projected: Projections) -> None:
        """Handle a chunk."""
        for step in range(STEPS + 1):
            layers = self.session.denoise(step) if step < STEPS else self.session.commit()
            for layer in layers:
                self.session.workspace.owner = None  # another layer's keys, even of a model of one
                layer.attend(*projected, self.hold)
        self.session.finish_commit()

    def resident(self) -> int:
        """Return the bytes held between two chunks."""
        held: int = self.session.stats()["resident_bytes"]
        return held


class FlashDreams:
    """FlashDreams' cache, used as its attention modules use it."""

    def __init__(
        self, shape: Geometry, module: ModuleType, on_read: bool, clones: bool = True, device: torch.device = CPU
    ) -> None:
        self.shape, self.on_read, self.clones, self.index, self.device = shape, on_read, clones, 0, device
        tokens, size = shape.tokens_per_frame, (1, WINDOW * shape.tokens_per_frame, shape.heads, shape.head_dim)
        one = size, size, 1, CHUNK * tokens, WINDOW * tokens
        self.caches = [module.BlockKVCache(*one, device=device, dtype=shape.dtype) for _ in range(shape.layers)]
        self.turns = self.angles(0, WINDOW)
        self.attended: tuple[Tensor, Tensor] | None = None

    def angles(self, first: int, frames: int) -> Tensor:
        """Return rotations to consecutive places."""
        places = grid_coordinates(frames, self.shape.grid).double() + torch.tensor([first, 0, 0])
        return rotations(places[None].to(self.device), self.shape)

    def prepare(self) -> None:
        """Make the coming chunk's angles."""
        if not self.on_read:
            self.turns = self.angles(self.index * CHUNK, CHUNK)

    def chunk(self, projected: Projections) -> None:
        """Handle a chunk."""
        _, keys, values = projected
        for _ in range(STEPS + 1):
            for cache in self.caches:
                cache.before_update(self.index)
                cache.update(keys if self.on_read else rotate(keys, self.turns), values)
                read = cache.cached_k()
                if self.on_read:
                    turns = self.turns[:, : read.shape[1]]
                    own = read.clone() if self.clones else read
                    read = rotate(own, turns, out=own) if self.clones else rotate(own, turns)
                self.attended = read, cache.cached_v()
                cache.after_update(self.index)
        self.index += 1

    def resident(self) -> int:
        """Return the bytes held between two chunks: the cache, and the rotated keys that a forward needs besides."""
        held = sum(cache._k.nbytes + cache._v.nbytes for cache in self.caches)
        return held + (self.caches[0]._k.nbytes if self.on_read else 0)


def no_queries(vectors: Tensor, turns: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate keys only."""
    return vectors if out is None else rotate(vectors, turns, out)


def driven(sides: dict[str, Any], shape: Geometry, chunks: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return seconds of the steady chunks, taken in turns, and the bytes that one more moves."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    moved = {}
    with patch.object(attended, "rotate", no_queries):
        for chunk in range(WINDOW // CHUNK + 1 + chunks + 1):
            projected = projections(shape, chunk)
            for name, side in sides.items():
                if isinstance(side, FlashDreams):
                    side.prepare()
                counter, start = Moved(), time.process_time()
                if chunk < WINDOW // CHUNK + 1 + chunks:
                    side.chunk(projected)
                    if chunk > WINDOW // CHUNK:
                        spent[name].append(time.process_time() - start)
                else:
                    with counter:
                        side.chunk(projected)
                    moved[name] = counter.nbytes
    return spent, moved


def pair(shape: Geometry, module: ModuleType, on_read: bool, chunks: int, name: str) -> list[Row]:
    """Return the figures of both sides with one way of handling keys."""
    way = "on read" if on_read else "absolute"
    mine, theirs = f"kvpack, {way}, {name}", f"FlashDreams, {way}, {name}"
    sides: dict[str, Any] = {mine: Kvpack(shape, on_read), theirs: FlashDreams(shape, module, on_read)}
    if on_read:
        sides[f"FlashDreams, {way}, no clone, {name}"] = FlashDreams(shape, module, on_read, clones=False)
    say(f"flashdreams: {way}, {name}")
    spent, moved = driven(sides, shape, chunks)
    rows = []
    for side, memory in sides.items():
        rows += [
            samples(side, "chunk", [1e3 * each for each in spent[side]], "ms"),
            samples(side, "moved", [float(moved[side])], "bytes"),
            samples(side, "resident", [float(memory.resident())], "bytes"),
        ]
    for side, memory in sides.items():
        if side != mine:
            suffix = ", no clone" if "no clone" in side else ""
            ratios = [a / b for a, b in zip(spent[mine], spent[side], strict=True)]
            rows += [
                samples(mine, TIME + suffix, ratios, "ratio"),
                samples(mine, MOVED + suffix, [moved[mine] / moved[side]], "ratio"),
                samples(mine, RESIDENT + suffix, [sides[mine].resident() / memory.resident()], "ratio"),
            ]
    for side in sides.values():
        assert_same(sides[mine], side, shape)
    return rows


def assert_same(mine: Any, theirs: Any, shape: Geometry) -> None:
    """Raise if two sides did not attend the same keys up to a rounding, and the same values."""
    (keys, values), (other_keys, other_values) = mine.attended, theirs.attended
    away = float((keys.float() - other_keys.float()).abs().max())
    if not torch.equal(values, other_values) or away > 16 * torch.finfo(shape.dtype).eps:
        raise RuntimeError(f"the two sides attended different keys (by {away:.1e}) or values")


@torch.no_grad()
def run(small: bool = False) -> list[Row]:
    """Measure fp32 and bf16, absolute and on read."""
    module = flashdreams_cache()
    if module is None:
        raise SystemExit(f"flashdreams: nothing measured, {ABSENT}")
    rows, chunks = [], 2 if small else 9
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for on_read in (False, True):
            rows += pair(geometry(small, dtype), module, on_read, chunks, name)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    script("flashdreams", __doc__, run, BARS)
