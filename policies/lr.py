"""Low-resolution branch of the PackForcing compressor (arXiv 2603.25730, section 4): zero-shot, nothing is learned."""

from dataclasses import dataclass, field
from typing import get_args

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from kvpack.blocks import Coordinates, LatentChunk, Span
from kvpack.errors import require_choice
from kvpack.policies.pool import pooled_grid, pooled_span
from kvpack.roles import LatentCompressor


@dataclass(frozen=True)
class LowResolutionCompressor(LatentCompressor):
    """Decodes the chunk, shrinks its pixels 2x in time and 4x in space, and encodes it again.

    Differs from the paper: pixels are pooled adaptively to the 1 + 4m frames that the causal VAE encodes, and over
    the whole grid, so that no frame and no row is dropped.

    Args:
        coordinates: as those of `PoolCompressor`.

    Raises:
        InvalidOptionError: if `coordinates` is none of these.

    >>> LowResolutionCompressor().span(8, 4, (30, 52)).tokens
    182
    """

    coordinates: Coordinates = field(default="centered", kw_only=True)
    name = "lr"

    def __post_init__(self) -> None:
        require_choice("coordinates", self.coordinates, get_args(Coordinates))

    def span(self, first_frame: int, frames: int, grid: tuple[int, int]) -> Span:
        """A token for every shrunk cell."""
        return pooled_span(first_frame, frames, grid, self.coordinates)

    def tokens(self, chunk: LatentChunk) -> Float[Tensor, "b n d"]:
        """Patch embeddings of the shrunk chunk."""
        time, rows, columns = pooled_grid(chunk.latents.shape[2], chunk.grid)
        height, width = rows * chunk.pixels_per_token[0], columns * chunk.pixels_per_token[1]
        small = adaptive_avg_pool3d(chunk.pixels().float(), (1 + 4 * (time - 1), height, width))
        return chunk.embed(chunk.encode(small))
