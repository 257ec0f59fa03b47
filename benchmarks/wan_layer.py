"""One transformer layer of Wan's size that generates from kvpack's memory, and two others to compare it with."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from benchmarks.clock import Clock, seconds
from benchmarks.gpu.video import quickly
from benchmarks.report import SEED
from kvpack import Geometry, Session
from kvpack.adapters.attention import ForwardLayers, PackedAttnProcessor
from kvpack.memory import attended, plan, stack, stack_plan
from kvpack.memory.archive import Archive
from kvpack.memory.rope import rotate
from kvpack.memory.stack_plan import StackPlan
from kvpack.memory.store import Arena
from kvpack.plugins.registry import registry
from kvpack.policies.stacks import packforcing

STEPS, FRAMES, WAN_LAYERS, TEXT_TOKENS = 4, 4, 30, 512
SINK, RECENT, TOPK, ARCHIVED = 8, 4, 16, 20
LIST, CHOOSE, PLACE = "list the blocks", "choose mid blocks", "positions and angles"
GATHER, ARRANGE = "gather mid blocks", "bring blocks to their places"
ROTATE, WRITE = "rotate history, in every forward", "write current keys and values"
POOL, STORE = "commit: pool", "commit: store in the archive, sum keys"
KEEP, BOOKS = "commit: keep the chunk's keys before RoPE", "commit: the rest"
REST, PARTS = "the rest", (LIST, CHOOSE, PLACE, GATHER, ARRANGE, ROTATE, WRITE)
QUERIES = "rotate queries, which is the transformer's own work"
TWIN, SHRINK = "lr: forward of the twin", "lr: shrink and encode, a layer's share"
Projections = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Size:
    """Of the layer and of the measurement."""

    heads: int
    head_dim: int
    ffn: int
    grid: tuple[int, int]
    vae_width: int
    chunks: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def geometry(self, dtype: torch.dtype) -> Geometry:
        side = 2 * (self.head_dim // 6)
        return Geometry(1, self.heads, self.head_dim, self.grid, (self.head_dim - 2 * side, side, side), dtype=dtype)


WAN = Size(heads=12, head_dim=128, ffn=8960, grid=(30, 52), vae_width=96, chunks=5)
TINY = Size(heads=2, head_dim=12, ffn=32, grid=(4, 8), vae_width=3, chunks=2)


def nothing(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Stands in for attention."""
    return queries


class InPlace:
    """Attends rotated keys and values that lie in place, and writes nothing: the transformer's own work."""

    def __init__(self, layer: Layer, projections: Projections) -> None:
        held: list[Tensor] = []

        def hold(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            held.extend((keys, values))
            return queries

        layer.memory.attend(*projections, hold)
        self.turns, (self.keys, self.values) = layer.chunk_rotations, held

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, attention: Any) -> Any:
        return attention(rotate(queries, self.turns), self.keys, self.values)


class Plain:
    """Concatenates and rotates history and current keys in every forward."""

    def __init__(self, layer: Layer) -> None:
        planned, cache, state = layer.session.plan, layer.session.caches[0], layer.session.past.states[0]
        assert isinstance(planned, StackPlan)
        assert cache.attended is not None
        assert cache.attended.rotations is not None
        assert cache.selected is not None
        self.turns = layer.chunk_rotations
        self.all_turns = torch.cat([*cache.attended.rotations, self.turns], dim=1)
        slots = [planned.mid[block].slot for block in cache.selected[0].tolist()]
        whole = [(kept.block.keys, kept.block.values) for kept in state.whole]
        blocks = [(slot, state.archive.slot_tokens) for slot in slots]
        mid = [(state.archive.block_keys(*each), state.archive.block_values(*each)) for each in blocks]
        sink, recent = ([whole[index] for index in part] for part in (planned.sink, planned.recent))
        self.history = [*sink, *mid, *recent]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, attention: Any) -> Any:
        all_keys = torch.cat([*(block[0] for block in self.history), keys], dim=1)
        all_values = torch.cat([*(block[1] for block in self.history), values], dim=1)
        return attention(rotate(queries, self.turns), rotate(all_keys, self.all_turns), all_values)


class Layer:
    """One transformer layer with random weights, a session, and a history long enough for a real choice."""

    def __init__(
        self,
        size: Size,
        dtype: torch.dtype,
        compressor: str,
        selector: str = "topk",
        store: str = "dense",
        archived: int = ARCHIVED,
    ) -> None:
        torch.manual_seed(SEED)
        self.size, self.dtype = size, dtype
        self.block = WanTransformerBlock(size.width, size.ffn, size.heads, cross_attn_norm=True).to(dtype).eval()
        self.layers, backend = ForwardLayers(), self.block.attn1.processor._attention_backend
        self.processor: Any = PackedAttnProcessor(backend, self.layers, 0)
        self.block.attn1.set_processor(self.processor)
        four_roles = packforcing(
            compressor=compressor,
            selector=selector,
            topk=TOPK,
            sink_frames=SINK,
            recent_frames=RECENT,
            chunk_frames=FRAMES,
            archive_blocks=archived,
        )
        four_roles = replace(four_roles, store=registry().policy("codec", store))
        self.session = Session(four_roles, size.geometry(dtype))
        self.compressor, self.clock = four_roles.compressor, Clock()
        self.tokens = FRAMES * self.session.geometry.tokens_per_frame
        self.text, self.modulation = self.random(TEXT_TOKENS, size.width), torch.randn(1, 6, size.width)
        with nullcontext() if archived == ARCHIVED else quickly(self.session):
            for _ in range((SINK + RECENT) // FRAMES + archived):
                self.commit(self.projections())
                self.session.finish_commit()
        self.commit_parts = (*((POOL,) if compressor == "pool" else ()), STORE, KEEP, BOOKS)

    @property
    def memory(self) -> Any:
        """The layer in the forward that was announced last."""
        return self.session.layers[0]

    @property
    def chunk_rotations(self) -> Tensor:
        """Rotations of the chunk's tokens; the chunk has had a forward."""
        planned, cache = self.session.plan, self.session.caches[0]
        assert planned is not None
        assert cache.attended is not None
        return planned.chunk_rotations(cache.attended.chunk_start, torch.device("cpu"))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(1, *shape, dtype=self.dtype)

    def projections(self) -> Projections:
        """Queries, keys and values of a chunk."""
        shape = self.tokens, self.size.heads, self.size.head_dim
        return self.random(*shape), self.random(*shape), self.random(*shape)

    @contextmanager
    def watched(self) -> Iterator[Clock]:
        """A clock on what kvpack does in a chunk."""
        clock, whole = self.clock, rotate

        def apart(vectors: Tensor, turns: Tensor, out: Tensor | None = None) -> Tensor:
            if out is not None:
                return whole(vectors, turns, out)
            with clock.part(QUERIES, outer=WRITE):
                return whole(vectors, turns)

        def timed(owner: Any, method: str, name: str, outer: str = "", leaf: bool = False) -> Any:
            return patch.object(owner, method, clock.timed(getattr(owner, method), name, outer, leaf))

        clock.seconds = defaultdict(float)
        with ExitStack() as patches:
            for each in (
                timed(stack, "choose", CHOOSE, leaf=True),
                timed(StackPlan, "place", PLACE, leaf=True),
                timed(stack_plan, "rotations", PLACE, leaf=True),
                timed(plan, "rotations", PLACE, leaf=True),
                timed(Archive, "gather", GATHER),
                timed(Arena, "arrange", ARRANGE, leaf=True),
                timed(Arena, "write", ARRANGE),
                timed(attended.InPlace, "_rotated_history", ROTATE, outer=WRITE, leaf=True),
                timed(attended.InPlace, "attend", WRITE),
                timed(attended.InPlace, "keep", KEEP),
                timed(Archive, "write", STORE, outer=BOOKS),
                timed(type(self.compressor), "compress", POOL, outer=BOOKS),
                patch.object(attended, "rotate", apart),
            ):
                patches.enter_context(each)
            yield clock

    def denoise(self, step: int) -> None:
        """Announces a denoising forward."""
        with self.clock.part(LIST):
            self.session.denoise(step)
        self.others_come()

    def others_come(self) -> None:
        """Lets the other layers of a model have the workspace, so that this one fills it anew."""
        self.session.workspace.owner = None

    def announce_commit(self) -> None:
        """Announces the clean chunk's forward."""
        self.session.commit()
        self.others_come()

    def commit(self, projections: Projections) -> None:
        """The forwards of a clean chunk and of its twin, without a transformer."""
        self.announce_commit()
        self.memory.attend(*projections, nothing)
        for piece in self.session.pending_compressions():
            self.session.compress(piece)
            self.others_come()
            tokens = self.session.twin_span(piece).tokens
            query, key, value = (each[:, :tokens] for each in projections)
            self.memory.attend(query, key, value, nothing)

    def finish(self) -> None:
        """The end of a commit."""
        with self.clock.part(BOOKS):
            self.session.finish_commit()

    def forward(self, hidden: Tensor, memory: Any) -> float:
        """Seconds of the block's forward over some memory."""
        self.layers.hand_out([memory])
        return seconds(partial(self.block, hidden, self.text, self.modulation, None))

    def parts(self) -> dict[str, float]:
        """Seconds of all but the transformer's own work in the next chunk, by part and as a whole."""
        projections = self.projections()
        with self.watched() as clock:
            start = time.perf_counter()
            for step in range(STEPS):
                self.denoise(step)
                self.memory.attend(*projections, nothing)
            self.commit(projections)
            self.finish()
            overhead = time.perf_counter() - start - clock.seconds[QUERIES]
        parts = {name: clock.seconds[name] for name in (*PARTS, *self.commit_parts)}
        return {**parts, REST: overhead - sum(parts.values()), "overhead": overhead}

    def whole(self) -> tuple[float, list[float]]:
        """Seconds of the next chunk, and of each of its forwards with the keys in place."""
        hidden, projections = self.random(self.tokens, self.size.width), self.projections()
        spent, own = 0.0, []
        for step in range(STEPS + 1):
            spent += seconds(partial(self.denoise, step) if step < STEPS else self.announce_commit)
            spent += self.forward(hidden, self.memory)
            own.append(self.forward(hidden, InPlace(self, projections)))
        return spent + seconds(self.finish), own

    def in_place(self) -> list[float]:
        """Seconds of forwards with the keys in place."""
        self.denoise(0)
        hidden, in_place = self.random(self.tokens, self.size.width), InPlace(self, self.projections())
        return [self.forward(hidden, in_place) for _ in range(3)]

    def twin(self) -> float:
        """Seconds of a twin's own forward."""
        (piece,) = self.session.pending_compressions()
        self.announce_commit()
        self.memory.attend(*self.projections(), nothing)
        self.session.compress(piece)
        self.others_come()
        hidden = self.random(self.session.twin_span(piece).tokens, self.size.width)
        return self.forward(hidden, self.memory)

    def plain(self) -> float:
        """Seconds of a chunk's concatenating and rotating."""
        query, key, value = self.projections()
        self.session.denoise(0)
        self.memory.attend(query, key, value, nothing)
        plain, in_place = Plain(self), InPlace(self, (query, key, value))
        spent = [seconds(partial(plain.attend, query, key, value, nothing)) for _ in range(STEPS + 1)]
        own = [seconds(partial(in_place.attend, query, key, value, nothing)) for _ in range(STEPS + 1)]
        return sum(spent) - sum(own)

    def difference(self) -> float:
        """How far the plain version's attention is from kvpack's."""
        projections, attention = self.projections(), dispatch_attention_fn
        self.session.denoise(0)
        mine = self.memory.attend(*projections, attention)
        theirs = Plain(self).attend(*projections, attention)
        return float((mine - theirs).norm() / theirs.norm())
