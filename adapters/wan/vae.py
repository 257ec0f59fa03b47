"""Streaming use of `AutoencoderKLWan`: decode chunk by chunk with a feature cache of one's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from kvpack.errors import UnsupportedPipelineError


class StreamingDecoder:
    """Decodes a video in pieces, bit-equal to decoding it at once.

    The feature cache is about 605 kB per latent pixel in fp32: 3.5 GiB at 832x480.

    Args:
        vae: the pipeline's VAE.
        height: pixels of a frame.
        width: pixels of a frame.

    Raises:
        UnsupportedPipelineError: if the VAE would decode frames of this size in tiles.
    """

    def __init__(self, vae: Any, height: int, width: int) -> None:
        if vae.use_tiling and (height > vae.tile_sample_min_height or width > vae.tile_sample_min_width):
            raise UnsupportedPipelineError(
                "tiled decoding keeps every tile for all time and cannot stream; call pipe.vae.disable_tiling() first, "
                'or generate with output_type="latent" and decode afterwards'
            )
        self.vae = vae
        self.features: list[Any] = [None] * vae._cached_conv_counts["decoder"]
        self.first = True

    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1] of the next normalised latents, `[batch, 3, frames, height, width]`."""
        vae = self.vae
        onload(vae)
        latents = latents.to(vae.dtype)
        mean, std = _statistics(vae, latents)
        latents = latents / (1.0 / std) + mean  # the pipeline's own order of operations, for its very bits
        hidden = vae.post_quant_conv(latents)
        frames = []
        for frame in hidden.split(1, dim=2):
            options = {"first_chunk": True} if self.first else {}
            frames.append(vae.decoder(frame, feat_cache=self.features, feat_idx=[0], **options))
            self.first = False
        pixels = torch.cat(frames, dim=2)
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        return pixels.clamp(min=-1.0, max=1.0)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Normalised latents (the posterior's mode) of `1 + 4m` pixel frames."""
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    def channels(values: list[float]) -> Tensor:
        return torch.tensor(values).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)

    return channels(vae.config.latents_mean), channels(vae.config.latents_std)


def onload(module: Any) -> None:
    """Lets model or group offloading bring a module in, when a part of it is called instead of its forward."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(module)
    group = _offload_group(module)
    if group is not None:
        group.onload_()
        if group.stream is not None:
            group.stream.synchronize()


@contextmanager
def onloaded(module: Any) -> Iterator[None]:
    """The same for a block, whose group goes out again."""
    onload(module)
    yield
    group = _offload_group(module)
    if group is not None:
        group.offload_()


def _offload_group(module: Any) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("group_offloading")
    return None if hook is None else hook.group


def embed(transformer: Any, latents: Tensor) -> Tensor:
    """The model's own patch embedding: latents to hidden tokens `[batch, tokens, width]`."""
    onload(transformer)
    return transformer.patch_embedding(latents.to(transformer.dtype)).flatten(2).transpose(1, 2)


@contextmanager
def riding(transformer: Any, tokens: Tensor) -> Iterator[None]:
    """Lets hidden tokens ride in forwards, behind those of the latents, whose output alone is returned.

    Args:
        transformer: a `WanTransformer3DModel`.
        tokens: hidden tokens `[batch, tokens, width]`.
    """
    count = tokens.shape[1]
    handles = [
        transformer.patch_embedding.register_forward_hook(
            lambda _, __, embedded: torch.cat([embedded.flatten(2), tokens.transpose(1, 2)], dim=2)[..., None, None]
        ),
        transformer.proj_out.register_forward_hook(lambda _, __, output: output[:, :-count].contiguous()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward_tokens(transformer: Any, tokens: Tensor, forward: Any) -> None:
    """Runs hidden tokens alone through the transformer, in the place of patch-embedded ones.

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
    replaced = tokens.transpose(1, 2).unflatten(2, grid)
    handle = transformer.patch_embedding.register_forward_hook(lambda *_: replaced)
    try:
        forward(dummy)
    finally:
        handle.remove()
