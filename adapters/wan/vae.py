"""Streaming use of `AutoencoderKLWan`: decode chunk by chunk with a feature cache of one's own."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from kvpack.adapters.offload import onload
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

    def state(self) -> dict[str, Any]:
        """Return what it remembers of the frames before, as data."""
        return {"features": list(self.features), "first": self.first}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.features, self.first = list(state["features"]), bool(state["first"])

    def __call__(self, latents: Tensor) -> Tensor:
        """Return pixels in [-1, 1] of the next normalised latents, `[batch, 3, frames, height, width]`."""
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
    """Return normalised latents (the posterior's mode) of `1 + 4m` pixel frames."""
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    def channels(values: list[float]) -> Tensor:
        return torch.tensor(values).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)

    return channels(vae.config.latents_mean), channels(vae.config.latents_std)
