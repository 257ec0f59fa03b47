"""A `WanPipeline` in training: its model rolled out over kvpack's memory without its sampler."""

from typing import Any

import torch
from torch import Tensor

from kvpack.adapters.wan.denoiser import WanDenoiser
from kvpack.adapters.wan.vae import StreamingDecoder, encode
from kvpack.generation.adapter import Adapter, call_signature
from kvpack.generation.trainee import Rollout, Trainee
from kvpack.memory.layer import LayerCache
from kvpack.memory.stack import Stack

_BRANCH = "cond"


class WanTrainee(Trainee):
    """Encodes, embeds and rolls out.

    Args:
        adapter: the family's adapter.
        pipeline: a `WanPipeline`.
        max_sequence_length: text tokens; the pipeline's own default if None.
    """

    def __init__(self, adapter: Adapter, pipeline: Any, max_sequence_length: int | None = None) -> None:
        self.adapter, self.pipeline = adapter, pipeline
        self.temporal_scale = adapter.temporal_scale(adapter.configs(pipeline))
        self.spatial_scale = pipeline.vae_scale_factor_spatial
        # The call's default, which generation has; that of encode_prompt is shorter, 226 tokens.
        default = call_signature(type(pipeline)).parameters["max_sequence_length"].default
        self.max_sequence_length = max_sequence_length or default

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return normalised latents, the posterior's mode."""
        return encode(self.pipeline.vae, pixels.to(self.pipeline.vae.device))

    @torch.no_grad()
    def embed(self, captions: list[str]) -> Tensor:
        """Return text embeddings as the pipeline makes them."""
        pipeline = self.pipeline
        embeds, _ = pipeline.encode_prompt(
            captions, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return embeds.to(pipeline.transformer.dtype)

    def rollout(
        self, stack: Stack, embeds: Tensor, latent_size: tuple[int, int], buffer: type[LayerCache] = LayerCache
    ) -> Rollout:
        """Start a new video."""
        height, width = (size * self.pipeline.vae_scale_factor_spatial for size in latent_size)
        configs = self.adapter.configs(self.pipeline)
        geometry = self.adapter.geometry(configs, height, width, self.pipeline.transformer.dtype)
        # One branch: training has no guidance.
        denoiser = WanDenoiser(self.pipeline, stack, geometry, {_BRANCH: embeds}, buffer=buffer)
        decoder = StreamingDecoder(self.pipeline.vae, height, width) if stack.needs_pixels else None
        return Rollout(denoiser, _BRANCH, decoder)

    def velocity(self, transformer: Any, noisy: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """Return what the stock transformer predicts."""
        noisy, embeds = noisy.to(transformer.dtype), embeds.to(transformer.dtype)
        return transformer(noisy, timesteps, embeds, return_dict=False)[0]
