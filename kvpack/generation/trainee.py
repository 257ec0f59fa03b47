"""What training does with a model family: forwards over kvpack's memory without a pipeline's sampler."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvpack.generation.denoiser import Denoiser
from kvpack.memory.layer import LayerCache
from kvpack.memory.stack import Stack


class Rollout:
    """One video over kvpack's memory, driven chunk by chunk by training instead of by a pipeline; gradients pass.

    Args:
        denoiser: its transformer over the memory of a `Stack`.
        branch: its one branch.
        decoder: decodes chunks for a compressor that looks at pixels.
    """

    def __init__(self, denoiser: Denoiser, branch: str, decoder: Callable[[Tensor], Tensor] | None = None) -> None:
        self.denoiser, self.branch, self.decoder = denoiser, branch, decoder
        self.session = denoiser.session(branch)

    def attached(self) -> AbstractContextManager[None]:
        """Put the memory into the transformer; `predict` and `commit` need it, and one rollout at a time has it."""
        return self.denoiser.seam()

    def predict(
        self, noisy: Float[Tensor, "batch channels frames height width"], timestep: float, step: int
    ) -> Float[Tensor, "batch channels frames height width"]:
        """Return the velocity (noise minus clean) that the model predicts for the chunk behind the history.

        Args:
            noisy: the noisy chunk.
            timestep: what the model is told of its noise, in 0..1000.
            step: denoising step; mid blocks are chosen at step 0 and kept in those behind it.
        """
        # Of floats: a shifted schedule has no whole numbers.
        timesteps = torch.full((noisy.shape[0],), timestep, device=noisy.device)
        return self.denoiser.predict(self.branch, noisy.to(self.denoiser.transformer.dtype), timesteps, step)

    def commit(self, latents: Float[Tensor, "batch channels frames height width"]) -> None:
        """Write a clean chunk into history; gradients pass into a compressor, not into what is kept whole."""
        with torch.no_grad():  # pixels are what the compressor is given; nothing learns through the decoder
            pixels = None if self.decoder is None else self.decoder(latents)
        self.denoiser.commit(latents, pixels)


class Trainee(ABC):
    """What training must be able to do with a pipeline beside generating."""

    #: Pixel frames of a latent frame, of which a clip's first stands for one alone.
    temporal_scale: int = 4
    #: Pixel rows and columns of a latent's.
    spatial_scale: int = 8

    @abstractmethod
    def encode(self, pixels: Float[Tensor, "batch 3 frames height width"]) -> Tensor:
        """Return normalised latents `[batch, channels, 1 + m, height, width]` of frames in [-1, 1].

        Args:
            pixels: `1 + temporal_scale * m` frames.
        """

    @abstractmethod
    def embed(self, captions: list[str]) -> Tensor:
        """Return text embeddings `[captions, tokens, width]`."""

    @abstractmethod
    def rollout(
        self, stack: Stack, embeds: Tensor, latent_size: tuple[int, int], buffer: type[LayerCache] = LayerCache
    ) -> Rollout:
        """Start a new video of `latent_size` (height, width) for each row of text embeddings.

        Args:
            stack: the memory policy.
            embeds: text embeddings.
            latent_size: height and width of the latents.
            buffer: what a layer attends; `GraphLayer` lets gradients through.
        """

    @abstractmethod
    def velocity(self, transformer: Any, noisy: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """Return what a stock transformer of this family predicts for a whole video at once."""
