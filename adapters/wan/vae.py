"""Streaming use of `AutoencoderKLWan`: decode chunk by chunk with a feature cache of one's own."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from kvpack.adapters.offload import onload
from kvpack.errors import SnapshotError, UnsupportedPipelineError
from kvpack.generation.compile_boundary import compiled_from


class StreamingDecoder:
    """Decodes a video in pieces, bit-equal to decoding it at once.

    The feature cache is about 605 kB per latent pixel in fp32: 3.5 GiB at 832x480.

    Args:
        vae: the pipeline's VAE.
        height: pixels of a frame.
        width: pixels of a frame.

    Raises:
        UnsupportedPipelineError: if the VAE would decode frames of this size in tiles, or is another decoder.
    """

    def __init__(self, vae: Any, height: int, width: int) -> None:
        require_own(vae, "decoding chunk by chunk, which a stream and memories that look at pixels do")
        # As in the VAE's own decode: smaller frames are not tiled.
        if vae.use_tiling and (height > vae.tile_sample_min_height or width > vae.tile_sample_min_width):
            raise UnsupportedPipelineError(
                "tiled decoding keeps every tile for all time and cannot stream; call pipe.vae.disable_tiling() first, "
                'or generate with output_type="latent" and decode afterwards'
            )
        self.vae = vae
        # Not the VAE's, which any encode or decode clears.
        self.features: list[Any] = [None] * vae._cached_conv_counts["decoder"]
        self.first = True

    def state(self) -> dict[str, Any]:
        """Return what it remembers of the frames before, as data."""
        return {"features": list(self.features), "first": self.first}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            SnapshotError: if that is not of this VAE's decoder.
        """
        features, wanted = list(state["features"]), len(self.features)
        # "Rep" is what diffusers' decoder notes of a first frame.
        if len(features) != wanted or not all(isinstance(each, Tensor | None) or each == "Rep" for each in features):
            raise SnapshotError(f"the VAE's decoder remembers {wanted} tensors, but {len(features)} things are there")
        self.features, self.first = features, bool(state["first"])

    def __call__(self, latents: Tensor) -> Tensor:
        """Return pixels in [-1, 1] of the next normalised latents, `[batch, 3, frames, height, width]`."""
        vae = self.vae
        onload(vae)  # `vae.decode`, whose decorator does this, is not called
        hidden = vae.post_quant_conv(_scaled(vae, latents))
        frames = []
        # Frame by frame, as upstream's own loop: convolutions keep what they need of the frames before.
        for frame in hidden.split(1, dim=2):
            options = {"first_chunk": True} if self.first else {}
            # `feat_idx` counts the convolutions of one call, each of which has its place in the cache.
            frames.append(vae.decoder(frame, feat_cache=self.features, feat_idx=[0], **options))
            self.first = False
        pixels = torch.cat(frames, dim=2)
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        return pixels.clamp(min=-1.0, max=1.0)


class WholeDecoder:
    """Decodes a whole video at once, as the pipeline's call does, with whatever decoder is in the VAE's place.

    Args:
        vae: has what the pipeline asks of it: `decode`, `dtype`, and `latents_mean` and `latents_std` in its config.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def __call__(self, latents: Tensor) -> Tensor:
        """Return pixels in [-1, 1] of all normalised latents, `[batch, 3, frames, height, width]`."""
        onload(self.vae)
        return self.vae.decode(_scaled(self.vae, latents), return_dict=False)[0]


def is_own(vae: Any) -> bool:
    """Return whether a VAE is the family's, whose parts kvpack may call."""
    return isinstance(compiled_from(vae), AutoencoderKLWan)


def require_own(vae: Any, what: str) -> None:
    """Raise `UnsupportedPipelineError` unless a VAE is the family's; `what` says what needs it."""
    if not is_own(vae):
        raise UnsupportedPipelineError(
            f"{what}, needs the model's own AutoencoderKLWan, but this pipeline has {_named(vae)}; "
            f"load it with its vae{'' if vae is None else ', or generate the whole video in one call'}"
        )


def require_vae(vae: Any, what: str) -> None:
    """Raise `UnsupportedPipelineError` if there is no VAE at all; `what` says what needs it."""
    if vae is None:
        raise UnsupportedPipelineError(f"{what} needs a VAE, but this pipeline has none; load it with its vae")


def _named(vae: Any) -> str:
    return "no VAE" if vae is None else f"a {type(compiled_from(vae)).__name__} in its place"


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Return normalised latents (the posterior's mode) of `1 + 4m` pixel frames.

    Raises:
        UnsupportedPipelineError: if there is no VAE, or another one.
    """
    require_own(vae, "encoding frames, which those that a video begins with are")
    # The mode, for a sample would draw from a generator.
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


def _scaled(vae: Any, latents: Tensor) -> Tensor:
    """Return latents as the decoder takes them, by the pipeline's own order of operations, for its very bits."""
    latents = latents.to(vae.dtype)
    mean, std = _statistics(vae, latents)
    return latents / (1.0 / std) + mean


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    def channels(values: list[float]) -> Tensor:
        return torch.tensor(values).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)  # by channel

    return channels(vae.config.latents_mean), channels(vae.config.latents_std)
