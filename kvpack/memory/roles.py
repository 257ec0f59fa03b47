"""The four roles of a policy. An author subclasses one of them as a frozen dataclass; nothing else is needed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvpack.memory.blocks import KVBlock, LatentChunk, Span, joined
from kvpack.memory.costs import Cost, LatentShape
from kvpack.memory.geometry import Geometry
from kvpack.memory.policy import Policy

Part = Literal["sink", "mid", "recent"]
#: How hidden tokens become keys and values: through the whole model, or by each layer's own projections alone.
Project = Literal["layers", "direct"]
#: Where tokens sit: as `span` says, or as the data says, other places in each batch row, or in each of its heads.
Places = Literal["span", "row", "head"]


@dataclass(frozen=True)
class Segment:
    """Consecutive history frames that belong to one part of the memory."""

    part: Part
    frames: range


class Partitioner(Policy, ABC):
    """Says of every history frame: keep whole (sink, recent), compress (mid) or, if in no segment, drop."""

    role: ClassVar[str] = "partitioner"

    @property
    @abstractmethod
    def horizon_frames(self) -> int:
        """Age in frames after which a frame's part never changes."""

    @abstractmethod
    def partition(self, history_frames: int, chunk_frames: int) -> tuple[Segment, ...]:
        """Segments of a history of `history_frames`, ascending and disjoint, while the next chunk is generated."""

    def check(self, chunk_frames: int) -> None:
        """Raise `InvalidOptionError` if the policy cannot work with chunks of `chunk_frames`."""


class Compressor(Policy, ABC):
    """Makes a smaller block of a block, in key/value space."""

    role: ClassVar[str] = "compressor"
    #: Where tokens sit; other places than those of `span` are in the returned block's own, and are stored with it.
    places: ClassVar[Places] = "span"
    #: Most queries that `compress` sees as `block.queries`, spread evenly over the chunk at whose commit it is called.
    max_queries: ClassVar[int] = 0

    @abstractmethod
    def span(self, first_frame: int, frames: int, grid: tuple[int, int]) -> Span:
        """Tokens that will stand for `frames` frames, and where in these they sit; the same at every `first_frame`."""

    @abstractmethod
    def compress(self, block: KVBlock, grid: tuple[int, int]) -> KVBlock:
        """Return the block that stands for `block`, with the tokens that `span` announces."""

    def compress_all(self, blocks: Sequence[KVBlock], grid: tuple[int, int]) -> list[KVBlock]:
        """Return what `compress` does of the same block in a few layers; a device is soonest done with all at once."""
        return [self.compress(block, grid) for block in blocks]

    @property
    def merges(self) -> bool:
        """Whether `merged` makes one block of two."""
        alike = self.places == "span" or type(self).merged is not Compressor.merged
        return alike and type(self).level is Compressor.level

    def merged(self, older: KVBlock, newer: KVBlock, grid: tuple[int, int]) -> KVBlock:
        """Return a block of as many tokens that stands for two neighbours: of tokens at equal places, the mean of both.

        Args:
            older: a compressed block whose tokens have places of their own, `[rows, tokens, 3]` or by head.
            newer: one of as many tokens that begins where the other one ends.
            grid: token rows and columns of a latent frame.
        """
        share = newer.span.frames / (older.span.frames + newer.span.frames)  # a mean has more frames
        both = joined(older, newer)

        def mean(tokens: Tensor) -> Tensor:
            one, two = tokens.float().chunk(2, dim=1)  # float32, so that the mean is rounded once
            return one.lerp(two, share).to(tokens)

        span = replace(both.span, coordinates=mean(both.span.coordinates))
        return replace(both, keys=mean(both.keys), values=mean(both.values), span=span)

    def level(self, age: int) -> int:
        """How small a block is attended that `age` newer ones in the archive have followed; 0 as it was archived."""
        return 0

    def shrunk_span(self, span: Span, grid: tuple[int, int], level: int) -> Span:
        """Return the tokens of an archived block that are attended at a level above 0, and where they sit."""
        raise NotImplementedError(f"{type(self).__name__} has level(), so it must have shrunk_span()")

    def shrunk(self, block: KVBlock, grid: tuple[int, int], level: int) -> KVBlock:
        """Return an archived block as attended at a level above 0, with the tokens that `shrunk_span` announces."""
        raise NotImplementedError(f"{type(self).__name__} has level(), so it must have shrunk()")


class LatentCompressor(Compressor):
    """Makes hidden tokens of a clean latent chunk; the model turns them into each layer's keys and values."""

    #: Whether `tokens` looks at the chunk's pixels; if not, nothing is decoded for it.
    needs_pixels: ClassVar[bool] = True

    @property
    def project(self) -> Project:
        """How tokens become keys and values: through all "layers" in the context that the commit saw, or "direct"."""
        return "layers"

    @property
    def network(self) -> nn.Module | None:
        """What it has learned, by which a saved generation knows it again; None if it learns nothing."""
        return None

    def check(self, channels: int, width: int, patch: tuple[int, int], native: tuple[int, int] | None = None) -> None:
        """Raise `InvalidOptionError` if it cannot work with a model; called before anything is generated.

        Args:
            channels: channels of a latent.
            width: channels of a hidden token.
            patch: latent rows and columns of a token.
            native: token rows and columns of a token of the model's own embedding for compressed latents; None if it
                has none.
        """

    def costs(self, frames: int, geometry: Geometry, shape: LatentShape) -> dict[str, Cost]:
        """Cost of making the tokens of `frames` latent frames of one video, by branch; empty if nobody counts it."""
        return {}

    @abstractmethod
    def tokens(self, chunk: LatentChunk) -> Float[Tensor, "batch tokens width"]:
        """Hidden tokens, as many as `span` announces, that stand where patch-embedded tokens stand."""

    def compress(self, block: KVBlock, grid: tuple[int, int]) -> KVBlock:
        """Raise `TypeError`: a latent-space compressor works before key/value space."""
        raise TypeError(f"{type(self).__name__} compresses latents, not keys and values")


def _without_positions(*_: object) -> Tensor:
    raise TypeError("this Query or Candidates was made without positions; give it `rotated` or `rotated_keys`")


@dataclass(frozen=True, eq=False)
class Query:
    """What a selector may see of the chunk that is being generated, at its first denoising step.

    Args:
        queries: queries of one layer after their norm and before RoPE.
        layer: index of the layer.
        chunk: index of the chunk.
        rotated: returns the queries after RoPE at their positions in the video; costs nothing unless called.
        mean_heads: returns the mean over processes of what is a mean over the heads of one.
    """

    queries: Float[Tensor, "batch tokens heads head_dim"]
    layer: int
    chunk: int
    rotated: Callable[[], Tensor] = _without_positions
    mean_heads: Callable[[Tensor], Tensor] = field(default=lambda mean: mean)


@dataclass(frozen=True, eq=False)
class Candidates:
    """The archived mid blocks of one layer, oldest first.

    Args:
        first_frames: first latent frame of each block.
        frames: latent frames that each block stands for.
        tokens: tokens of each block, on the model's device.
        key_sums: sum over each block's keys before RoPE.
        keys: returns one block's keys before RoPE, `[batch, tokens, heads, head_dim]`.
        rotated_keys: returns the same after RoPE at their positions in the video; costs nothing unless called.
        runs: returns keys before RoPE of all blocks, of consecutive ones of one size together; at most so many.
    """

    first_frames: tuple[int, ...]
    frames: tuple[int, ...]
    tokens: Int[Tensor, " blocks"]
    key_sums: Float[Tensor, "batch blocks heads head_dim"]
    keys: Callable[[int], Tensor]
    rotated_keys: Callable[[int], Tensor] = _without_positions
    runs: Callable[[int], Iterator[Tensor]] | None = None

    def together(self, most: int) -> Iterator[Float[Tensor, "batch some tokens heads head_dim"]]:
        """Yield keys before RoPE of all blocks, of at most `most` consecutive ones of one size together."""
        return stacked(map(self.keys, range(self.count)), most) if self.runs is None else self.runs(most)

    @property
    def count(self) -> int:
        """Number of candidates."""
        return len(self.frames)


class Selector(Policy, ABC):
    """Chooses which compressed blocks a chunk attends: once a chunk, for each layer and batch row."""

    role: ClassVar[str] = "selector"

    @abstractmethod
    def limit(self, candidates: int) -> int:
        """How many of `candidates` blocks are chosen; known before the forward, so that buffers are."""

    @abstractmethod
    def select(self, query: Query, candidates: Candidates) -> Int[Tensor, "batch chosen"]:
        """Return indices of the chosen blocks, `limit` distinct ones a row, in any order; not called if all are."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The attended blocks before they have positions: sink, then mid, then recent, each oldest first.

    Args:
        parts: part of each block.
        first_frames: first latent frame of each block.
        frames: latent frames that each block stands for.
        lengths: the same, but of a block that was made of several, those of one.
        chunk_first_frame: first latent frame of the current chunk.
        chunk_frames: latent frames of the current chunk.
    """

    parts: tuple[Part, ...]
    first_frames: Float[Tensor, "rows blocks"]
    frames: Float[Tensor, "rows blocks"]
    lengths: Float[Tensor, "rows blocks"]
    chunk_first_frame: int
    chunk_frames: int

    def columns(self, part: Part) -> slice:
        """Return which columns are those of one part; a slice, since a GPU is waited for when a list is an index.

        >>> empty = torch.zeros(1, 3)
        >>> Layout(("sink", "mid", "mid"), empty, empty, empty, 0, 4).columns("mid")
        slice(1, 3, None)
        """
        first = self.parts.index(part) if part in self.parts else 0
        return slice(first, first + self.parts.count(part))


@dataclass(frozen=True, eq=False)
class Placement:
    """Temporal positions. Frame f of a block of F frames sits at `start + (f + 0.5) * length / F - 0.5`.

    Args:
        starts: position of each block's first frame when it is not squeezed.
        lengths: positions that each block spans.
        chunk_start: position of the current chunk's first frame; the chunk is never squeezed.
    """

    starts: Float[Tensor, "rows blocks"]
    lengths: Float[Tensor, "rows blocks"]
    chunk_start: Float[Tensor, " rows"]

    @classmethod
    def consecutive(cls, lengths: Float[Tensor, "rows blocks"]) -> "Placement":
        """Blocks one behind the other from 0, the current chunk right behind them."""
        ends = lengths.cumsum(dim=1)
        return cls(ends - lengths, lengths, lengths.sum(dim=1))


class Reindexer(Policy, ABC):
    """Gives temporal positions to the chosen blocks and to the current chunk."""

    role: ClassVar[str] = "reindexer"
    #: True if positions depend on how many blocks were chosen, not on which: computed once for all layers then.
    shared: ClassVar[bool] = False
    #: True if a frame's position is its index in the video: keys that nothing else reads can be kept rotated then.
    absolute: ClassVar[bool] = False

    @abstractmethod
    def place(self, layout: Layout) -> Placement:
        """Positions for `layout`."""

    def check(self, partitioner: Partitioner, chunk_frames: int) -> None:
        """Raise `InvalidOptionError` if the positions cannot hold this partition."""


def stacked(blocks: Iterable[Tensor], most: int) -> Iterator[Float[Tensor, "batch some tokens heads head_dim"]]:
    """Yield `[batch, tokens, heads, head_dim]` of consecutive blocks of one size together, at most `most`."""
    together: list[Tensor] = []
    for block in blocks:
        if together and (len(together) == most or block.shape[1] != together[0].shape[1]):
            yield torch.stack(together, dim=1)
            together = []
        together.append(block)
    if together:
        yield torch.stack(together, dim=1)


def as_indices(values: range, rows: int, device: torch.device) -> Int[Tensor, "rows chosen"]:
    """Return the same block indices for every batch row."""
    return torch.arange(values.start, values.stop, device=device).expand(rows, -1)
