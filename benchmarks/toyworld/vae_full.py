"""The tiny VAE, and its encode and decode over the whole clip at once: equal to the stock chunked ones, much faster."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from torch import Tensor

CONFIG = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "in_channels": 48,
    "out_channels": 48,
    "patch_size": 4,
    "is_residual": True,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}


def build() -> AutoencoderKLWan:
    """Build the stock class at 0.73 M parameters: 64x64 pixels become 16 channels of 4x4 a latent frame."""
    return AutoencoderKLWan(**CONFIG)


def _frames(layer: torch.nn.Module, x: Tensor) -> Tensor:
    batch, _, frames = x.shape[:3]
    y = layer(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (batch, frames)).transpose(1, 2)


def _down(sampler: WanResample, x: Tensor) -> Tensor:
    x = _frames(sampler.resample, x)
    if sampler.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], sampler.time_conv(x)], 2)
    return x


def _up(sampler: WanResample, x: Tensor) -> Tensor:
    if sampler.mode == "upsample3d" and x.shape[2] > 1:
        twice = sampler.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
        x = torch.cat([x[:, :, :1], twice.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
    return _frames(sampler.resample, x)


def encode(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log-variance of the latents of a video [B, 3, 1 + 4m, H, W] in -1..1."""
    encoder = vae.encoder
    x = encoder.conv_in(patchify(video, vae.config.patch_size))
    for block in encoder.down_blocks:
        y = x
        for resnet in block.resnets:
            y = resnet(y)
        if block.downsampler is not None:
            y = _down(block.downsampler, y)
        x = y + block.avg_shortcut(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    mean, log_variance = vae.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode latents [B, 16, 1 + m, h, w] to a video that is not clamped."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        y = x
        for resnet in block.resnets:
            y = resnet(y)
        if block.upsampler is not None:
            y = _up(block.upsampler, y)
        x = y if block.avg_shortcut is None else y + block.avg_shortcut(x, first_chunk=True)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    video: Tensor = unpatchify(x, vae.config.patch_size)
    return video
