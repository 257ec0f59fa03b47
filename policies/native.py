"""The compressed patch embedding that a model was itself trained with (FAR, arXiv 2503.19325): nothing is added."""

from dataclasses import dataclass, field
from math import prod
from typing import get_args

from jaxtyping import Float
from torch import Tensor

from kvpack.errors import InvalidOptionError, require_choice, require_int
from kvpack.memory.blocks import LatentChunk, Span, grid_coordinates
from kvpack.memory.costs import Cost, LatentShape
from kvpack.memory.geometry import Geometry
from kvpack.memory.roles import LatentCompressor, Project


@dataclass(frozen=True)
class NativeCompressor(LatentCompressor):
    """Each latent frame in the larger patches of the model's own `far_patch_embedding`; time is not compressed.

    Tokens sit at the centres of their patches, which is where the model turns them. Rows and columns of the token grid
    that fill no whole patch are dropped, as the model does.

    Args:
        window: token rows, and columns, of a patch; the model's own.
        project: as that of `LowResolutionCompressor`.

    Raises:
        InvalidOptionError: if `window` or `project` is wrong, or, where it meets a model, if
            that has no such embedding.

    >>> NativeCompressor().span(8, 3, (30, 52)).tokens, NativeCompressor().span(0, 1, (4, 5)).coordinates[1].tolist()
    (1170, [0.0, 0.5, 2.5])
    """

    window: int = 2
    project: Project = field(default="layers", kw_only=True)
    name = "native"
    needs_pixels = False

    def __post_init__(self) -> None:
        require_int("window", self.window, minimum=1)
        require_choice("project", self.project, get_args(Project))

    def span(self, first_frame: int, frames: int, grid: tuple[int, int]) -> Span:
        """Return a token for every whole patch."""
        rows, columns = (side // self.window for side in grid)
        if not rows or not columns:
            raise InvalidOptionError(
                f"compressor native needs frames of at least {self.window}x{self.window} tokens, got "
                f"{grid[0]}x{grid[1]}; make the video larger or give another compressor, e.g. pool"
            )
        covered = (rows * self.window, columns * self.window)
        return Span(first_frame, frames, grid_coordinates(frames, covered, (frames, rows, columns)))

    def check(self, channels: int, width: int, patch: tuple[int, int], native: tuple[int, int] | None = None) -> None:
        """Check that the model has such an embedding, of this window."""
        if native is None:
            raise InvalidOptionError(
                "compressor native is the model's own embedding for compressed frames, but this model has none; "
                "give another one, e.g. pool"
            )
        if native != (self.window, self.window):
            raise InvalidOptionError(
                f"compressor native has window {self.window}, but a patch of this model is {native[0]}x{native[1]} "
                "tokens; give its own"
            )

    def tokens(self, chunk: LatentChunk) -> Float[Tensor, "b n d"]:
        """Return the model's own embedding of the latents."""
        if chunk.native is None:
            raise InvalidOptionError("compressor native needs a model that has an embedding for compressed frames")
        return chunk.native(chunk.latents)

    def costs(self, frames: int, geometry: Geometry, shape: LatentShape) -> dict[str, Cost]:
        """Count one strided convolution, whose weights are the model's."""
        # A kernel as large as the patch, without overlap.
        weights = shape.channels * prod(shape.patch) * self.window**2 * geometry.width
        return {"native": Cost(weights + geometry.width, 2 * weights * self.span(0, frames, geometry.grid).tokens)}
