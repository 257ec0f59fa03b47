"""One transformer layer of Wan's size that generates from kvpack's memory, and two others to compare it with."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from benchmarks.clock import Clock, seconds
from benchmarks.report import SEED
from kvpack import Geometry, Session
from kvpack.adapters.attention import ForwardLayers, PackedAttnProcessor
from kvpack.memory.rope import rotate
from kvpack.policies.stacks import packforcing

STEPS, FRAMES, WAN_LAYERS, TEXT_TOKENS = 4, 4, 30, 512
SINK, RECENT, TOPK, ARCHIVED = 8, 4, 16, 20
LIST, CHOOSE, PLACE = "list the blocks", "choose mid blocks", "positions and angles"
GATHER, ROTATE, WRITE = "gather mid blocks", "rotate history into the buffer", "write current keys and values"
POOL, STORE, BOOKS = "commit: pool", "commit: store in the archive, sum keys", "commit: the rest"
REST, PARTS = "the rest", (LIST, CHOOSE, PLACE, GATHER, ROTATE, WRITE)
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
    """Attends what kvpack's buffer holds, and writes nothing: the transformer's own work."""

    def __init__(self, session: Session) -> None:
        self.layer = session.layers[0]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, attention: Any) -> Any:
        buffer, turns = self.layer.buffer, self.layer.chunk_turns
        assert turns is not None
        stop = buffer.lengths[0] + keys.shape[1]
        return attention(rotate(queries, turns), buffer.keys[:, :stop], buffer.values[:, :stop])


class Plain:
    """Concatenates and rotates history and current keys in every forward."""

    def __init__(self, session: Session) -> None:
        current, chosen = session.current, session.layers[0].chosen
        assert current is not None
        assert chosen is not None
        self.turns = current.turns(chosen, chosen.device)
        archive, slots = session.layers[0].archive, [current.slots[i] for i in chosen[0].tolist()]
        mid = [(archive.keys[:, slot], archive.values[:, slot]) for slot in slots]
        self.history = [held.layers[0] for held in current.sink] + mid + [held.layers[0] for held in current.recent]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, attention: Any) -> Any:
        all_keys = torch.cat([*(block[0] for block in self.history), keys], dim=1)
        all_values = torch.cat([*(block[1] for block in self.history), values], dim=1)
        rotated = rotate(all_keys, torch.cat([self.turns.context, self.turns.chunk], dim=1))
        return attention(rotate(queries, self.turns.chunk), rotated, all_values)


class Layer:
    """One transformer layer with random weights, a session, and a history long enough for a real choice."""

    def __init__(self, size: Size, dtype: torch.dtype, compressor: str) -> None:
        torch.manual_seed(SEED)
        self.size, self.dtype = size, dtype
        self.block = WanTransformerBlock(size.width, size.ffn, size.heads, cross_attn_norm=True).to(dtype).eval()
        self.layers, backend = ForwardLayers(), self.block.attn1.processor._attention_backend
        self.processor: Any = PackedAttnProcessor(backend, self.layers, 0)
        self.block.attn1.set_processor(self.processor)
        stack = packforcing(
            compressor=compressor,
            topk=TOPK,
            sink_frames=SINK,
            recent_frames=RECENT,
            chunk_frames=FRAMES,
            archive_blocks=ARCHIVED,
        )
        self.session = Session(stack, size.geometry(dtype))
        self.memory = self.session.layers[0]
        self.tokens = FRAMES * self.session.geometry.tokens_per_frame
        self.text, self.modulation = self.random(TEXT_TOKENS, size.width), torch.randn(1, 6, size.width)
        for _ in range((SINK + RECENT) // FRAMES + ARCHIVED):
            self.commit(self.projections())
            self.session.finish_commit()
        self.clock, self.commit_parts = self.watched(), (POOL, STORE, BOOKS) if compressor == "pool" else (STORE, BOOKS)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(1, *shape, dtype=self.dtype)

    def projections(self) -> Projections:
        """Queries, keys and values of a chunk."""
        shape = self.tokens, self.size.heads, self.size.head_dim
        return self.random(*shape), self.random(*shape), self.random(*shape)

    def watched(self) -> Clock:
        """A clock on what kvpack does in a chunk."""
        clock, memory = Clock(), self.memory
        clock.watch(memory, "_select", CHOOSE)
        clock.watch(memory.archive, "gather", GATHER)
        clock.watch(memory.buffer, "append", ROTATE, leaf=True)
        clock.watch(memory.buffer, "_write", WRITE, leaf=True)
        clock.watch(memory.archive, "write", STORE, outer=BOOKS)
        clock.watch(self.session.stack.compressor, "compress", POOL, outer=BOOKS)
        return clock

    def denoise(self, step: int) -> None:
        """Announces a denoising forward."""
        with self.clock.part(LIST):
            self.session.denoise(step)
        if step == 0:
            assert self.session.current is not None
            self.clock.watch(self.session.current, "turns", PLACE)

    def commit(self, projections: Projections) -> None:
        """The forwards of a clean chunk and of its twin, without a transformer."""
        self.session.commit()
        self.memory.attend(*projections, nothing)
        for piece in self.session.twins_due():
            self.session.compress(piece)
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
        projections, clock = self.projections(), self.clock
        clock.seconds = defaultdict(float)
        start = time.perf_counter()
        with patch("kvpack.memory.store.rotate", clock.timed(rotate, QUERIES)):
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
        hidden, in_place = self.random(self.tokens, self.size.width), InPlace(self.session)
        spent, own = 0.0, []
        for step in range(STEPS + 1):
            spent += seconds(partial(self.denoise, step) if step < STEPS else self.session.commit)
            spent += self.forward(hidden, self.memory)
            own.append(self.forward(hidden, in_place))
        return spent + seconds(self.finish), own

    def in_place(self) -> list[float]:
        """Seconds of forwards with the keys in place."""
        hidden = self.random(self.tokens, self.size.width)
        return [self.forward(hidden, InPlace(self.session)) for _ in range(3)]

    def twin(self) -> float:
        """Seconds of a twin's own forward."""
        (piece,) = self.session.twins_due()
        self.session.commit()
        self.memory.attend(*self.projections(), nothing)
        self.session.compress(piece)
        hidden = self.random(self.session.twin_span(piece).tokens, self.size.width)
        return self.forward(hidden, self.memory)

    def plain(self) -> float:
        """Seconds of a chunk's concatenating and rotating."""
        query, key, value = self.projections()
        self.session.denoise(0)
        self.memory.attend(query, key, value, nothing)
        plain, in_place = Plain(self.session), InPlace(self.session)
        spent = [seconds(partial(plain.attend, query, key, value, nothing)) for _ in range(STEPS + 1)]
        own = [seconds(partial(in_place.attend, query, key, value, nothing)) for _ in range(STEPS + 1)]
        return sum(spent) - sum(own)

    def difference(self) -> float:
        """How far the plain version's attention is from kvpack's."""
        projections, attention = self.projections(), self.processor.attention
        self.session.denoise(0)
        mine = self.memory.attend(*projections, attention)
        theirs = Plain(self.session).attend(*projections, attention)
        return float((mine - theirs).norm() / theirs.norm())
