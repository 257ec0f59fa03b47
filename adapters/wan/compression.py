"""A latent-space compressor in a Wan transformer: what it sees, and how its tokens become keys and values."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor

from kvpack.adapters.offload import onload, onloaded
from kvpack.errors import PolicyError
from kvpack.generation.chunks import pixel_frames
from kvpack.generation.denoiser import Denoiser
from kvpack.memory.attribution import broken, policy_call
from kvpack.memory.base import Memory
from kvpack.memory.blocks import LatentChunk
from kvpack.memory.ledger import BlockEntry


def check_compressor(transformer: Any, stack: Memory) -> None:
    """Raise `InvalidOptionError` if the stack's compressor cannot work with this transformer."""
    if stack.latent_compressor is not None:
        config = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        stack.latent_compressor.check(config.in_channels, width, patch_of(config), native_window(config))


def patch_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return latent rows and columns of a token, from a transformer's config."""
    _, rows, columns = config["patch_size"]
    return rows, columns


def native_window(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return rows and columns, in tokens, of a token of the model's own compressed embedding; None if it has none."""
    frames, *compressed = config.get("compressed_patch_size") or (0, 0, 0)
    rows, columns = (large // small for large, small in zip(compressed, patch_of(config), strict=True))
    return (rows, columns) if frames == 1 and rows and columns else None


def hidden_tokens(
    denoiser: Denoiser,
    piece: BlockEntry,
    latents: Tensor,
    pixels: Tensor | None,
    native: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Return what a latent-space compressor makes of a piece of a clean chunk, `[batch, tokens, width]`.

    Args:
        denoiser: has a latent compressor, a transformer and a VAE.
        piece: the frames.
        latents: the chunk's.
        pixels: the same decoded; None if the compressor says that it does not look at them.
        native: the model's own embedding for compressed latents, if it has one.

    Raises:
        PolicyError: if it is not what `span` announces.
    """
    compressor, pipeline, geometry = denoiser.stack.latent_compressor, denoiser.pipeline, denoiser.geometry
    assert compressor is not None
    first_frame, scale = denoiser.frames, pipeline.vae_scale_factor_temporal
    rows, columns = (side * pipeline.vae_scale_factor_spatial for side in patch_of(pipeline.transformer.config))

    def pixel_index(frame: int) -> int:
        """Return the first pixel frame of a latent frame; the video's first latent frame is one pixel frame."""
        return pixel_frames(frame - first_frame, first_frame, scale)

    def piece_pixels() -> Tensor:
        if pixels is None:
            name = type(compressor).__name__
            raise PolicyError(f"{name}.tokens asked for pixels, but its needs_pixels is False")
        return pixels[:, :, pixel_index(piece.first_frame) : pixel_index(piece.stop)]

    chunk = LatentChunk(
        latents=latents[:, :, piece.first_frame - first_frame : piece.stop - first_frame],
        first_frame=piece.first_frame,
        grid=geometry.grid,
        pixels=piece_pixels,
        encode=denoiser.encode,
        embed=lambda small: embed(denoiser.transformer, small),
        pixels_per_token=(rows, columns),
        width=geometry.width,
        dtype=denoiser.transformer.dtype,
        native=native,
    )
    # Counted in one branch: tokens are made once for all of them.
    with policy_call(compressor, "tokens", next(iter(denoiser.sessions.values())).policy_seconds):
        tokens = compressor.tokens(chunk)
    if not isinstance(tokens, Tensor):
        raise broken(compressor, "tokens", type(tokens).__name__, "it must be a tensor")
    wanted = (latents.shape[0], compressor.span(piece.first_frame, piece.frames, geometry.grid).tokens, geometry.width)
    if tuple(tokens.shape) != wanted:
        raise broken(compressor, "tokens", str(tuple(tokens.shape)), f"span() announces {wanted}")
    return tokens


def embed(transformer: Any, latents: Tensor) -> Tensor:
    """Return the model's own patch embedding of latents, hidden tokens `[batch, tokens, width]`."""
    onload(transformer)
    embedded = transformer.patch_embedding(latents.to(transformer.dtype))  # [batch, width, frames, rows, columns]
    return embedded.flatten(2).transpose(1, 2)  # [batch, frames * rows * columns, width]


@contextmanager
def appended_tokens(transformer: Any, tokens: Tensor) -> Iterator[None]:
    """Append hidden tokens to those of the latents in every forward, whose output is that of the latents alone.

    Args:
        transformer: a `WanTransformer3DModel`.
        tokens: hidden tokens `[batch, tokens, width]`.
    """
    count = tokens.shape[1]

    def append(_: Any, __: Any, embedded: Tensor) -> Tensor:
        every = torch.cat([embedded.flatten(2), tokens.transpose(1, 2)], dim=2)  # [batch, width, tokens]
        return every[..., None, None]  # [batch, width, tokens, 1, 1]: the forward flattens all from the third axis on

    def cut(_: Any, __: Any, output: Tensor) -> Tensor:
        return output[:, :-count].contiguous()  # before the forward unpatchifies, which takes a whole grid

    with transformer.patch_embedding.register_forward_hook(append), transformer.proj_out.register_forward_hook(cut):
        yield


def forward_tokens(transformer: Any, tokens: Tensor, forward: Any) -> None:
    """Run hidden tokens alone through the transformer, in the place of patch-embedded ones.

    Args:
        transformer: a `WanTransformer3DModel`.
        tokens: hidden tokens `[batch, tokens, width]`.
        forward: calls the transformer on latents of the right token count, whose values are not used.
    """
    count, (_, *patch) = tokens.shape[1], transformer.config.patch_size
    # Any grid of so many tokens will do, since kvpack has its own positions; the stock table ends at 1024.
    columns = max(n for n in range(1, min(count, 1024) + 1) if count % n == 0)
    grid = (1, count // columns, columns)
    channels = transformer.config.in_channels
    dummy = tokens.new_zeros(tokens.shape[0], channels, 1, grid[1] * patch[0], grid[2] * patch[1])
    replaced = tokens.transpose(1, 2).unflatten(2, grid)  # (b, width, 1, rows, columns)
    with transformer.patch_embedding.register_forward_hook(lambda *_: replaced):
        forward(dummy)


# As on the transformer's forward, which this stands in for: else `scale` would not reach its LoRA layers.
@apply_lora_scale("attention_kwargs")  # type: ignore[untyped-decorator]
def project_tokens(
    transformer: Any,
    tokens: Tensor,
    modulation: Callable[[], Tensor],
    *,
    attention_kwargs: Mapping[str, Any] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Return keys before RoPE and values of every layer, were the tokens its input.

    The first layer's are those of a forward, whose tokens have not met their context yet.

    Args:
        transformer: a `WanTransformer3DModel`.
        tokens: hidden tokens `[batch, tokens, width]`.
        modulation: gives shifts and scales of a clean token, `[batch, 6, width]`; called under LoRA's scale.
        attention_kwargs: those of the transformer's call; `scale` is that of its LoRA layers.
    """
    onload(transformer)
    shifts = modulation().float()  # blocks modulate in float32, whatever the model's dtype
    projected = []
    for block in transformer.blocks:
        with onloaded(block):  # one after the other, or all blocks of a group-offloaded model would stay in
            projected.append(_keys_values(block, tokens, shifts))
    return projected


def _keys_values(block: Any, tokens: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    attention = block.attn1
    shift, scale, *_ = (block.scale_shift_table + modulation).chunk(6, dim=1)
    hidden = (block.norm1(tokens.float()) * (1 + scale) + shift).type_as(tokens)
    if attention.fused_projections:
        _, keys, values = attention.to_qkv(hidden).chunk(3, dim=-1)
    else:
        keys, values = attention.to_k(hidden), attention.to_v(hidden)
    heads = (attention.heads, -1)
    return attention.norm_k(keys).unflatten(2, heads), values.unflatten(2, heads)  # (b, l, h, d)
