"""What a chunk costs beyond the transformer's own work, at the size of one layer of Wan2.1-1.3B on 27,872 keys.

One `WanTransformerBlock` (1536 wide, 12 heads, 8960 in the feed-forward, random weights) generates chunks of 6,240
tokens (4 frames of 30x52) from the `packforcing` memory: 8 sink frames, 16 of 20 archived blocks of 182 tokens,
4 recent frames, and the chunk.

own work    the block's forward with its 27,872 rotated keys and values already in place; a chunk is 4 denoising
            forwards and the commit's
overhead    everything else that kvpack does in a chunk: choosing, placing, gathering and rotating the history, writing
            the current keys and values in each forward, and the commit. Timed with an attention that does nothing
end to end  a whole chunk through kvpack over the same forwards with keys in place, taken in turns, minus 1 (fp32 only,
            for its length). Nothing is left out, but it is a difference of two long times
plain       keeps keys before RoPE too, but concatenates and rotates all of them in every forward (choice and angles for
            free)

With `lr` a chunk's compressed twin is made in latent space: its own forward through the layer counts as overhead, and
so does a 30th (the layer's share) of shrinking the decoded pixels and encoding them with a VAE of Wan's size in fp32.
Decoding does not: the user's video needs it. Positions and angles count whole, though 30 layers share them.

Values are medians over chunks (own work: over forwards), low and high the least and the greatest.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from benchmarks.report import SEED, Bar, Row, samples, say, script
from kvpack import Geometry, LatentChunk, Session
from kvpack.adapters.wan_attention import PackedWanAttnProcessor
from kvpack.adapters.wan_vae import embed, encode
from kvpack.policies.lr import LowResolutionCompressor
from kvpack.policies.stacks import packforcing
from kvpack.rope import rotate

BARS = (
    Bar("overhead of a chunk over the layer's own work", "kvpack", "overhead / own work", 0.05),
    Bar("the plain version's output is kvpack's", "plain", "relative difference", 0.02, timed=False),
)
STEPS, FRAMES, WAN_LAYERS, TEXT_TOKENS = 4, 4, 30, 512
SINK, RECENT, TOPK, ARCHIVED = 8, 4, 16, 20


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


class Clock:
    """Seconds spent in named parts, those in inner parts not counted; a leaf has no inner parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open: list[bool] = []

    @contextmanager
    def part(self, name: str, outer: str = "", leaf: bool = False) -> Iterator[None]:
        """Charges the time inside to `name`, instead of to the part `outer` that is open."""
        if self.open and self.open[-1]:
            yield
            return
        self.open.append(leaf)
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.open.pop()
        self.seconds[name] += spent
        if outer:
            self.seconds[outer] -= spent

    def timed(self, call: Callable[..., Any], name: str, outer: str = "", leaf: bool = False) -> Callable[..., Any]:
        """The same call on this clock."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name, outer, leaf):
                return call(*args, **kwargs)

        return timed

    def watch(self, owner: object, method: str, name: str, outer: str = "", leaf: bool = False) -> None:
        """Times every call of one object's method."""
        # Past the setter: policies are frozen.
        object.__setattr__(owner, method, self.timed(getattr(owner, method), name, outer, leaf))


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


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
        self.turns, current = session.layers[0].placed[0], session.current
        assert current is not None
        assert session.layers[0].chosen is not None
        archive, slots = session.layers[0].archive, [current.slots[i] for i in session.layers[0].chosen[0].tolist()]
        mid = [(archive.keys[:, slot], archive.values[:, slot]) for slot in slots]
        self.history = [held.layers[0] for held in current.sink] + mid + [held.layers[0] for held in current.recent]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, attention: Any) -> Any:
        all_keys = torch.cat([*(block[0] for block in self.history), keys], dim=1)
        all_values = torch.cat([*(block[1] for block in self.history), values], dim=1)
        rotated = rotate(all_keys, torch.cat([self.turns.context, self.turns.chunk], dim=1))
        return attention(rotate(queries, self.turns.chunk), rotated, all_values)


LIST, CHOOSE, PLACE = "list the blocks", "choose mid blocks", "positions and angles"
GATHER, ROTATE, WRITE = "gather mid blocks", "rotate history into the buffer", "write current keys and values"
POOL, STORE, BOOKS = "commit: pool", "commit: store in the archive, sum keys", "commit: the rest"
REST, PARTS = "the rest", (LIST, CHOOSE, PLACE, GATHER, ROTATE, WRITE)
QUERIES = "rotate queries, which is the transformer's own work"
TWIN, SHRINK = "lr: forward of the twin", "lr: shrink and encode, a layer's share"


class Layer:
    """One transformer layer with random weights, a session, and a history long enough for a real choice."""

    def __init__(self, size: Size, dtype: torch.dtype, compressor: str) -> None:
        torch.manual_seed(SEED)
        self.size, self.dtype = size, dtype
        self.block = WanTransformerBlock(size.width, size.ffn, size.heads, cross_attn_norm=True).to(dtype).eval()
        self.processor: Any = PackedWanAttnProcessor(self.block.attn1.processor)
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
        self.processor.memory = memory
        return seconds(partial(self.block, hidden, self.text, self.modulation, None))

    def parts(self) -> dict[str, float]:
        """Seconds of all but the transformer's own work in the next chunk, by part and as a whole."""
        projections, clock = self.projections(), self.clock
        clock.seconds = defaultdict(float)
        start = time.perf_counter()
        with patch("kvpack.packed.rotate", clock.timed(rotate, QUERIES)):
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

    def plain(self) -> tuple[float, float]:
        """Seconds of a chunk's concatenating and rotating, and how far its output is from kvpack's."""
        query, key, value = self.projections()
        self.session.denoise(0)
        mine = self.memory.attend(query, key, value, self.processor._attention)
        plain, in_place = Plain(self.session), InPlace(self.session)
        theirs = plain.attend(query, key, value, self.processor._attention)
        spent = [seconds(partial(plain.attend, query, key, value, nothing)) for _ in range(STEPS + 1)]
        own = [seconds(partial(in_place.attend, query, key, value, nothing)) for _ in range(STEPS + 1)]
        return sum(spent) - sum(own), float((mine - theirs).norm() / theirs.norm())


def shrink_seconds(size: Size, repeats: int) -> list[float]:
    """Seconds of one layer's share of making a twin's hidden tokens from decoded pixels."""
    vae = AutoencoderKLWan(base_dim=size.vae_width).eval()
    model = SimpleNamespace(patch_embedding=torch.nn.Conv3d(16, size.width, (1, 2, 2), (1, 2, 2)), dtype=torch.float32)
    height, width = (16 * side for side in size.grid)
    pixels = torch.rand(1, 3, 4 * FRAMES, height, width)
    chunk = LatentChunk(
        latents=torch.zeros(1, 16, FRAMES, height // 8, width // 8),
        first_frame=0,
        grid=size.grid,
        pixels=lambda: pixels,
        encode=partial(encode, vae),
        embed=partial(embed, model),
        pixels_per_token=(16, 16),
    )
    return [seconds(partial(LowResolutionCompressor().tokens, chunk)) / WAN_LAYERS for _ in range(repeats)]


def kvpack_rows(subject: str, chunks: list[dict[str, float]], chunk_seconds: float) -> list[Row]:
    """Milliseconds of each part, and the ratio of all to a chunk's own work."""
    parts = {name: [1e3 * chunk[name] for chunk in chunks] for name in chunks[0]}
    rows = [samples(subject, name, values, "ms") for name, values in parts.items()]
    ratios = [chunk["overhead"] / chunk_seconds for chunk in chunks]
    return [*rows, samples(subject, "overhead / own work", ratios, "ratio")]


def pool_rows(size: Size, dtype: torch.dtype, name: str) -> tuple[list[Row], float]:
    """The layer's own work, kvpack with `pool`, and the plain version; seconds of a chunk's own work."""
    layer = Layer(size, dtype, "pool")
    say(f"overhead: {name}, parts")
    parts = [layer.parts() for _ in range(size.chunks)]
    plain = [layer.plain() for _ in range(size.chunks)]
    say(f"overhead: {name}, whole forwards")
    whole = layer.whole() if dtype == torch.float32 else None
    forwards = whole[1] if whole else layer.in_place()
    chunk_seconds = (STEPS + 1) * median(forwards)
    keys = layer.memory.buffer.lengths[0] + layer.tokens
    subject, beside = f"kvpack, pool, {name}", f"plain: concatenates and rotates in every forward, {name}"
    end_to_end = [samples(subject, "end to end - 1", [whole[0] / sum(forwards) - 1], "ratio")] if whole else []
    return [
        samples(f"own work, {name}", f"forward, {layer.tokens:,} queries, {keys:,} keys in place", forwards, "s"),
        *kvpack_rows(subject, parts, chunk_seconds),
        *end_to_end,
        samples(beside, "overhead", [1e3 * spent for spent, _ in plain], "ms"),
        samples(beside, "overhead / own work", [spent / chunk_seconds for spent, _ in plain], "ratio"),
        samples(beside, "relative difference of its output to kvpack's", [off for _, off in plain], "ratio"),
    ], chunk_seconds


def lr_rows(size: Size, dtype: torch.dtype, name: str, chunk_seconds: float) -> list[Row]:
    """Kvpack with `lr`."""
    layer = Layer(size, dtype, "lr")
    say(f"overhead: {name}, lr")
    chunks = []
    for share in shrink_seconds(size, size.chunks):
        extra = {TWIN: layer.twin(), SHRINK: share}
        chunk = layer.parts()
        overhead = chunk.pop("overhead") + sum(extra.values())
        chunks.append({**chunk, **extra, "overhead": overhead})
    return kvpack_rows(f"kvpack, lr, {name}", chunks, chunk_seconds)


@torch.no_grad()
def run(small: bool = False) -> list[Row]:
    """Overhead in fp32 and bf16."""
    size, rows = TINY if small else WAN, []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        pool, chunk_seconds = pool_rows(size, dtype, name)
        rows += [*pool, *lr_rows(size, dtype, name, chunk_seconds)]
    return rows


if __name__ == "__main__":
    script("overhead", __doc__, run, BARS)
