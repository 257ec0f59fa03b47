"""The PackForcing compressor (arXiv 2603.25730, section 4): a high- and a low-resolution branch, added."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from kvpack.compressors.weights import branch_config
from kvpack.errors import InvalidOptionError
from kvpack.memory.blocks import LatentChunk
from kvpack.memory.costs import Cost, LatentShape
from kvpack.memory.geometry import Geometry
from kvpack.policies.hr import HighResolutionCompressor
from kvpack.policies.lr import LowResolutionCompressor


@dataclass(frozen=True)
class DualCompressor(HighResolutionCompressor):
    """The learned tokens of `hr` and the model's own tokens of `lr`, added; before training it is `lr`, bit for bit.

    Raises:
        InvalidOptionError: as `HighResolutionCompressor`.

    >>> DualCompressor().span(8, 4, (30, 52)).tokens
    182
    """

    name = "dual"
    needs_pixels = True

    def tokens(self, chunk: LatentChunk) -> Float[Tensor, "b n d"]:
        """Return the sum of both branches' tokens."""
        # The paper fuses the branches so, by element-wise addition.
        return super().tokens(chunk) + LowResolutionCompressor().tokens(chunk)

    def costs(self, frames: int, geometry: Geometry, shape: LatentShape) -> dict[str, Cost]:
        """Return the costs of both branches."""
        return {
            **LowResolutionCompressor().costs(frames, geometry, shape),
            **super().costs(frames, geometry, shape),
        }


def trained_compressor(source: str, chunk_frames: int | None = None) -> HighResolutionCompressor:
    """Load the compressor whose weights are in a folder or on the Hub, used as its config says.

    Args:
        source: folder or Hub id.
        chunk_frames: latent frames of the chunks that it is for; None takes any.

    Raises:
        InvalidOptionError: if there is none, or it was trained in chunks of another length.
    """
    config = branch_config(source)
    trained = config.get("chunk_frames")
    if None not in (trained, chunk_frames) and trained != chunk_frames:
        raise InvalidOptionError(
            f"compressor {source} was trained in chunks of {trained} latent frames, but chunk_frames is {chunk_frames}"
            "; give a compressor that was trained in chunks as long as the model's"
        )
    cls = HighResolutionCompressor if config.get("branches") == "hr" else DualCompressor
    options = {name: config[name] for name in ("coordinates", "project") if name in config}
    return cls(source, **options)
