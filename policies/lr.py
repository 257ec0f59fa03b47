"""Low-resolution branch of the PackForcing compressor (arXiv 2603.25730, section 4): zero-shot, nothing is learned."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from kvpack.memory.blocks import LatentChunk
from kvpack.memory.costs import Cost, LatentShape
from kvpack.memory.geometry import Geometry
from kvpack.policies.pool import PooledLatents, pooled_grid


@dataclass(frozen=True)
class LowResolutionCompressor(PooledLatents):
    """Decodes the chunk, shrinks its pixels 2x in time and 4x in space, and encodes it again.

    Differs from the paper: pixels are pooled adaptively to the 1 + 4m frames that the causal VAE encodes, and over
    the whole grid, so that no frame and no row is dropped.

    >>> LowResolutionCompressor().span(8, 4, (30, 52)).tokens
    182
    """

    name = "lr"

    def tokens(self, chunk: LatentChunk) -> Float[Tensor, "b n d"]:
        """Return the patch embeddings of the shrunk chunk."""
        small = adaptive_avg_pool3d(
            chunk.pixels().float(), _small_clip(chunk.latents.shape[2], chunk.grid, chunk.pixels_per_token)
        )
        # With the model's own patch embedding, so that tokens are of its kind without training.
        return chunk.embed(chunk.encode(small))

    def costs(self, frames: int, geometry: Geometry, shape: LatentShape) -> dict[str, Cost]:
        """Count the VAE's encoding of the small clip; decoding is not counted, for the frames are decoded anyway."""
        return {"lr": Cost(0, shape.encode_flops(*_small_clip(frames, geometry.grid, shape.pixels_per_token)))}


def _small_clip(frames: int, grid: tuple[int, int], pixels_per_token: tuple[int, int]) -> tuple[int, int, int]:
    """Return pixel frames, height and width of the shrunk chunk.

    >>> _small_clip(4, (30, 52), (16, 16))
    (5, 112, 208)
    """
    time, rows, columns = pooled_grid(frames, grid)
    # Wan's VAE drops what is over 1 + 4m frames.
    return 1 + 4 * (time - 1), rows * pixels_per_token[0], columns * pixels_per_token[1]
