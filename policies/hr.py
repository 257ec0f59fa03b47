"""High-resolution branch of the PackForcing compressor (arXiv 2603.25730, section 4), alone: learned, from latents."""

import os
from dataclasses import dataclass
from functools import cached_property
from math import prod

from jaxtyping import Float
from torch import Tensor

from kvpack.compressors.network import HighResolutionBranch
from kvpack.compressors.weights import CompressorWeights
from kvpack.errors import InvalidOptionError
from kvpack.memory.blocks import LatentChunk
from kvpack.memory.costs import Cost, LatentShape
from kvpack.memory.geometry import Geometry
from kvpack.policies.pool import PooledLatents, pooled_grid


@dataclass(frozen=True)
class HighResolutionCompressor(PooledLatents):
    """Strided convolutions over the chunk's latents; nothing is decoded for it. Its tokens are zero before training.

    Args:
        weights: folder or Hub id of a `HighResolutionBranch`, or one at hand, which is used itself while it is trained;
            None is what it is before training.

    Raises:
        InvalidOptionError: if `coordinates` or `project` is none of these, or `weights` is nothing of the kind.

    >>> HighResolutionCompressor().span(8, 4, (30, 52)).tokens
    182
    """

    weights: "str | os.PathLike[str] | HighResolutionBranch | None" = None
    name = "hr"
    needs_pixels = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.weights, os.PathLike):
            object.__setattr__(self, "weights", os.fspath(self.weights))  # so that it can be written as data
        if not isinstance(self.weights, str | HighResolutionBranch | None):
            raise InvalidOptionError(
                f"weights must be a folder, a Hub id, a HighResolutionBranch or None, got {type(self.weights).__name__}"
            )

    @property
    def network(self) -> HighResolutionBranch | None:
        """The convolutions; None before training."""
        return self._source.given

    def check(self, channels: int, width: int, patch: tuple[int, int], native: tuple[int, int] | None = None) -> None:
        """Load the weights and compare them with the model."""
        self._source.fitting(channels, width, patch)

    def tokens(self, chunk: LatentChunk) -> Float[Tensor, "b n d"]:
        """Return what the convolutions make of the latents."""
        latents = chunk.latents
        # A copy where the model is, made once; one that is trained is used itself.
        branch = self._source.on(latents.device, chunk.dtype, latents.shape[1], chunk.width, chunk.patch)
        return branch(latents, pooled_grid(latents.shape[2], chunk.grid)).to(latents.device, chunk.dtype)

    def costs(self, frames: int, geometry: Geometry, shape: LatentShape) -> dict[str, Cost]:
        """Count the convolutions and their projection."""
        branch = self._source.fitting(shape.channels, geometry.width, shape.patch)
        rows, columns = (tokens * patch for tokens, patch in zip(geometry.grid, shape.patch, strict=True))
        flops = branch.flops((frames, rows, columns), prod(pooled_grid(frames, geometry.grid)))
        return {"hr": Cost(sum(parameter.numel() for parameter in branch.parameters()), flops)}

    @cached_property
    def _source(self) -> CompressorWeights:
        assert not isinstance(self.weights, os.PathLike)
        return CompressorWeights(self.weights)
