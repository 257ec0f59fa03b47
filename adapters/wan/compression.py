"""Whether a latent-space compressor goes with a Wan transformer, and what it sees of a chunk."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from kvpack.adapters.wan.vae import embed, encode
from kvpack.errors import PolicyError
from kvpack.memory.attribution import blamed
from kvpack.memory.base import Memory
from kvpack.memory.blocks import LatentChunk
from kvpack.memory.geometry import Geometry
from kvpack.memory.ledger import Piece
from kvpack.memory.roles import LatentCompressor


def check_compressor(transformer: Any, stack: Memory) -> None:
    """Raises `InvalidOptionError` if the stack's compressor cannot work with this transformer."""
    if stack.latent_compressor is not None:
        config = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        stack.latent_compressor.check(config.in_channels, width, patch_of(config), native_window(config))


def patch_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Latent rows and columns of a token, from a transformer's config."""
    _, rows, columns = config["patch_size"]
    return rows, columns


def native_window(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Token rows and columns of a token of the model's own embedding for compressed latents; None if it has none."""
    frames, *compressed = config.get("compressed_patch_size") or (0, 0, 0)
    rows, columns = (large // small for large, small in zip(compressed, patch_of(config), strict=True))
    return (rows, columns) if frames == 1 and rows and columns else None


def latent_chunk(
    compressor: LatentCompressor,
    pipeline: Any,
    geometry: Geometry,
    piece: Piece,
    first_frame: int,
    latents: Tensor,
    pixels: Tensor | None,
    native: Callable[[Tensor], Tensor] | None,
) -> LatentChunk:
    """A piece of a clean chunk.

    Args:
        compressor: who will look at it.
        pipeline: has a transformer and a VAE.
        geometry: of the transformer.
        piece: the frames.
        first_frame: index of the chunk's first latent frame.
        latents: the chunk's.
        pixels: the same decoded; None if the compressor says that it does not look at them.
        native: the model's own embedding for compressed latents, if it has one.
    """
    transformer, scale = pipeline.transformer, pipeline.vae_scale_factor_temporal
    rows, columns = (side * pipeline.vae_scale_factor_spatial for side in patch_of(transformer.config))

    def pixel_index(frame: int) -> int:
        """First pixel frame of a latent frame, from the chunk's; the video's first latent is one pixel frame."""
        return max(0, (frame - first_frame) * scale - (scale - 1 if first_frame == 0 else 0))

    def piece_pixels() -> Tensor:
        if pixels is None:
            raise PolicyError(f"{type(compressor).__name__}.tokens asked for pixels, but its needs_pixels is False")
        return pixels[:, :, pixel_index(piece.first_frame) : pixel_index(piece.stop)]

    return LatentChunk(
        latents=latents[:, :, piece.first_frame - first_frame : piece.stop - first_frame],
        first_frame=piece.first_frame,
        grid=geometry.grid,
        pixels=piece_pixels,
        encode=lambda frames: encode(pipeline.vae, frames),
        embed=lambda small: embed(transformer, small),
        pixels_per_token=(rows, columns),
        width=geometry.width,
        dtype=transformer.dtype,
        native=native,
    )


def hidden_tokens(compressor: LatentCompressor, chunk: LatentChunk, seconds: dict[str, float]) -> Tensor:
    """What a latent-space compressor makes of a piece.

    Args:
        compressor: the policy.
        chunk: the piece.
        seconds: where the time is added that it takes.

    Raises:
        PolicyError: if it is not what `span` announces.
    """
    name = type(compressor).__name__
    with blamed(compressor, "tokens", seconds):
        tokens = compressor.tokens(chunk)
    if not isinstance(tokens, Tensor):
        raise PolicyError(f"{name}.tokens returned {type(tokens).__name__}, but it must be a tensor")
    span = compressor.span(chunk.first_frame, chunk.latents.shape[2], chunk.grid)
    wanted = (chunk.latents.shape[0], span.tokens, chunk.width)
    if tuple(tokens.shape) != wanted:
        raise PolicyError(f"{name}.tokens returned {tuple(tokens.shape)}, but span() announces {wanted}")
    return tokens
