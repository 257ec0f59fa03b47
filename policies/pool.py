"""Average pooling of keys and values; no training, no VAE, any model."""

from dataclasses import dataclass, field
from typing import get_args

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from kvpack.errors import require_choice
from kvpack.memory.blocks import Coordinates, KVBlock, Span, grid_coordinates
from kvpack.memory.roles import Compressor, LatentCompressor, Project


def pooled_grid(frames: int, grid: tuple[int, int]) -> tuple[int, int, int]:
    """Return the token grid of a compressed block: half in time, a quarter in space, rounded down, at least 1.

    PackForcing (arXiv 2603.25730), section 4.

    >>> pooled_grid(4, (30, 52))
    (2, 7, 13)
    """
    return max(1, frames // 2), max(1, grid[0] // 4), max(1, grid[1] // 4)


def averaged(
    tokens: Float[Tensor, "b thw h d"], sizes: tuple[int, int, int], pooled: tuple[int, int, int]
) -> Float[Tensor, "b n h d"]:
    """Average a grid of tokens over adaptive-pooling windows, summed in float32."""
    cells = tokens.flatten(2).unflatten(1, sizes).movedim(-1, 1)  # (b, h*d, t, h, w)
    # Windows that overlap by a token where sizes do not divide.
    means = adaptive_avg_pool3d(cells.float(), pooled).to(tokens.dtype)  # (b, h*d, t', h', w')
    return means.flatten(2).transpose(1, 2).unflatten(2, tokens.shape[2:])  # (b, t'*h'*w', h, d)


@dataclass(frozen=True)
class PoolCompressor(Compressor):
    """Averages keys before RoPE, and values, over 2x4x4 windows that cover the whole grid, odd sizes included.

    Args:
        coordinates: a token's (t, y, x): "centered" is the centre of the cells that it covers, "strided" the first of
            them, "compact" its index among the tokens, which puts all memory into a corner of the frame.

    Raises:
        InvalidOptionError: if `coordinates` is none of these.

    >>> PoolCompressor().span(8, 4, (4, 4)).coordinates.tolist()
    [[0.5, 1.5, 1.5], [2.5, 1.5, 1.5]]
    >>> [PoolCompressor(coordinates=way).span(8, 4, (4, 8)).coordinates[-1].tolist() for way in ("strided", "compact")]
    [[2.0, 0.0, 4.0], [1.0, 0.0, 1.0]]
    """

    coordinates: Coordinates = field(default="centered", kw_only=True)
    name = "pool"
    by_head = True

    def __post_init__(self) -> None:
        require_choice("coordinates", self.coordinates, get_args(Coordinates))

    def pooled(self, frames: int, grid: tuple[int, int]) -> tuple[int, int, int]:
        """Return how many windows there are in time, rows and columns."""
        return pooled_grid(frames, grid)

    def span(self, first_frame: int, frames: int, grid: tuple[int, int]) -> Span:
        """Return a token for every window; the block spans `frames` positions wherever its tokens sit in it."""
        return Span(first_frame, frames, grid_coordinates(frames, grid, self.pooled(frames, grid), self.coordinates))

    def compress(self, block: KVBlock, grid: tuple[int, int]) -> KVBlock:
        """Average every window."""
        frames = block.span.frames
        sizes, pooled = (frames, *grid), self.pooled(frames, grid)
        keys, values = (averaged(each, sizes, pooled) for each in (block.keys, block.values))
        return KVBlock(keys, values, self.span(block.span.first_frame, frames, grid))


@dataclass(frozen=True)
class PooledLatents(LatentCompressor):
    """Base of latent-space compressors with as many tokens as `PoolCompressor` has.

    Args:
        coordinates: as those of `PoolCompressor`.
        project: how tokens become keys and values: "layers" runs them through the model in the context that the commit
            saw, "direct" takes each layer's own projections of them.

    Raises:
        InvalidOptionError: if `coordinates` or `project` is none of these.
    """

    coordinates: Coordinates = field(default="centered", kw_only=True)
    project: Project = field(default="layers", kw_only=True)

    def __post_init__(self) -> None:
        require_choice("coordinates", self.coordinates, get_args(Coordinates))
        require_choice("project", self.project, get_args(Project))

    def span(self, first_frame: int, frames: int, grid: tuple[int, int]) -> Span:
        """Return the tokens of `PoolCompressor`."""
        return PoolCompressor(coordinates=self.coordinates).span(first_frame, frames, grid)
