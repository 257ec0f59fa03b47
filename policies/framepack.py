"""Older chunks are smaller (FramePack, arXiv 2504.12626; Helios, in diffusers): geometric compression of history."""

from dataclasses import dataclass, replace
from functools import cache

from jaxtyping import Float
from torch import Tensor

from kvpack.errors import require_int
from kvpack.memory.blocks import KVBlock, Span, grid_coordinates
from kvpack.memory.roles import Compressor, Reindexer
from kvpack.memory.stack import Stack
from kvpack.plugins.resolve import resolve_policy
from kvpack.policies.all_blocks import AllSelector
from kvpack.policies.pool import averaged
from kvpack.policies.sink_mid_recent import SinkMidRecentPartitioner

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class GeometricCompressor(Compressor):
    """Averages keys before RoPE, and values, over windows whose sides double with age.

    A block is archived at windows of 2x2x2 tokens. Behind the `newest_blocks` newest it is attended at 4x4x4, behind
    twice as many at 8x8x8, and so on to `levels`: each level has as many blocks as all newer ones together, and a block
    an eighth of the tokens that it had a level before. Where windows do not divide a side, neighbours may overlap by a
    token. Tokens sit where the mean of the tokens sat that they stand for.

    Differs from both models, which embed latents anew in larger trained patches for every forward: means of keys need
    no training.

    Args:
        newest_blocks: archived blocks that are not shrunk.
        levels: how often the oldest block is.

    Raises:
        InvalidOptionError: if a number is negative, or no block is left as it is archived.

    >>> policy = GeometricCompressor(newest_blocks=1, levels=2)
    >>> [policy.level(age) for age in range(5)]
    [0, 1, 2, 2, 2]
    >>> [policy.shrunk_span(policy.span(0, 4, (8, 8)), (8, 8), level).tokens for level in (1, 2)]
    [4, 1]
    """

    newest_blocks: int = 1
    levels: int = 1
    name = "geometric"
    by_head = True

    def __post_init__(self) -> None:
        require_int("newest_blocks", self.newest_blocks, minimum=1)
        require_int("levels", self.levels)

    def span(self, first_frame: int, frames: int, grid: tuple[int, int]) -> Span:
        """Return a token for every window of 2x2x2."""
        return Span(first_frame, frames, grid_coordinates(frames, grid, _sizes(frames, grid, 0)))

    def compress(self, block: KVBlock, grid: tuple[int, int]) -> KVBlock:
        """Average every window of 2x2x2."""
        frames = block.span.frames
        keys, values = (averaged(each, (frames, *grid), _sizes(frames, grid, 0)) for each in (block.keys, block.values))
        return KVBlock(keys, values, self.span(block.span.first_frame, frames, grid))

    def level(self, age: int) -> int:
        """Return the level, one more each time that the age doubles."""
        return min(self.levels, (age // self.newest_blocks).bit_length())

    def shrunk_span(self, span: Span, grid: tuple[int, int], level: int) -> Span:
        """Average places."""
        return replace(span, coordinates=_places(span.frames, grid, level))

    def shrunk(self, block: KVBlock, grid: tuple[int, int], level: int) -> KVBlock:
        """Average keys and values."""
        old, new = _sizes(block.span.frames, grid, 0), _sizes(block.span.frames, grid, level)
        keys, values = (averaged(each, old, new) for each in (block.keys, block.values))
        return KVBlock(keys, values, self.shrunk_span(block.span, grid, level))


def _sizes(frames: int, grid: tuple[int, int], level: int) -> Sizes:
    """Return the tokens along time, rows and columns, rounded up, so that every token is in a window."""
    t, y, x = (-(-size // 2 ** (level + 1)) for size in (frames, *grid))
    return t, y, x


@cache
def _places(frames: int, grid: tuple[int, int], level: int) -> Float[Tensor, "tokens 3"]:
    old, new = _sizes(frames, grid, 0), _sizes(frames, grid, level)
    return averaged(grid_coordinates(frames, grid, old)[None, :, None], old, new)[0, :, 0]


def framepack(
    *,
    chunk_frames: int = 4,
    reindexer: str | Reindexer = "contiguous",
    train_frames: int | None = None,
    archive_blocks: int = 5,
) -> Stack:
    """Build Helios's history: the first frame, 16 frames in 4x4x4, 4 in 2x2x2, and the last 4 whole.

    Older frames are dropped. Its own sizes are 16, 2 and 1 frames; here they are whole chunks of four. Positions are
    consecutive, 29 in all.

    Args:
        chunk_frames: latent frames generated together.
        reindexer: name or instance of a re-indexer.
        train_frames: latent frames seen in training, for a re-indexer by name that takes it, 20 if None.
        archive_blocks: compressed blocks kept.
    """
    return Stack(
        "framepack",
        SinkMidRecentPartitioner(sink_frames=1, recent_frames=chunk_frames),
        GeometricCompressor(),
        AllSelector(),
        resolve_policy("reindexer", reindexer, {"train_frames": 20}, train_frames=train_frames),
        chunk_frames,
        archive_blocks,
    )
