"""A `WanPipeline` in training: its model rolled out over kvpack's memory without its sampler."""

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from kvpack.adapters.wan.denoiser import WanMemory
from kvpack.adapters.wan.vae import StreamingDecoder, encode
from kvpack.generation.adapter import Adapter, Rollout, Trainee
from kvpack.memory.layer import LayerCache
from kvpack.memory.session import Session
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
        default = inspect.signature(pipeline.__call__).parameters["max_sequence_length"].default
        self.max_sequence_length = max_sequence_length or default

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised latents, the posterior's mode."""
        return encode(self.pipeline.vae, pixels.to(self.pipeline.vae.device))

    @torch.no_grad()
    def embed(self, captions: list[str]) -> Tensor:
        """Text embeddings as the pipeline makes them."""
        pipeline = self.pipeline
        embeds, _ = pipeline.encode_prompt(
            captions, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return embeds.to(pipeline.transformer.dtype)

    def rollout(
        self, stack: Stack, embeds: Tensor, latent_size: tuple[int, int], buffer: type[LayerCache] = LayerCache
    ) -> "WanRollout":
        """A new video."""
        height, width = (size * self.pipeline.vae_scale_factor_spatial for size in latent_size)
        configs = {"transformer": self.pipeline.transformer.config, "vae": self.pipeline.vae.config}
        geometry = self.adapter.geometry(configs, height, width, self.pipeline.transformer.dtype)
        memory = WanMemory(self.pipeline, stack, geometry, {_BRANCH: embeds}, buffer=buffer)
        return WanRollout(memory, height, width)

    def velocity(self, transformer: Any, noisy: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """The stock forward."""
        noisy, embeds = noisy.to(transformer.dtype), embeds.to(transformer.dtype)
        return transformer(noisy, timesteps, embeds, return_dict=False)[0]


class WanRollout(Rollout):
    """One video of a `WanTrainee`.

    Args:
        memory: its memory.
        height: pixels of a frame.
        width: pixels of a frame.
    """

    def __init__(self, memory: WanMemory, height: int, width: int) -> None:
        session = memory.session(_BRANCH)
        assert isinstance(session, Session)  # of a Stack, see `rollout`
        self.memory, self.session = memory, session
        decodes = memory.compressor is not None and memory.compressor.needs_pixels
        self.decoder = StreamingDecoder(memory.pipeline.vae, height, width) if decodes else None

    def attached(self) -> AbstractContextManager[None]:
        """The memory in the transformer."""
        return self.memory.attached()

    def predict(self, noisy: Tensor, timestep: float, step: int) -> Tensor:
        """Velocity of a chunk."""
        timesteps = torch.full((noisy.shape[0],), timestep, device=noisy.device)
        return self.memory.forward(_BRANCH, noisy.to(self.memory.transformer.dtype), timesteps, step)

    def commit(self, latents: Tensor) -> None:
        """Writes a clean chunk into history."""
        with torch.no_grad():
            pixels = None if self.decoder is None else self.decoder(latents)
        self.memory.commit(latents, pixels)
