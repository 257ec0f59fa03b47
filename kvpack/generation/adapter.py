"""One model family: where its attention is and how its pipeline is driven chunk by chunk."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvpack.errors import UnsupportedPipelineError
from kvpack.generation.prompts import Prompt
from kvpack.memory.base import Memory
from kvpack.memory.costs import LatentShape, ModelCost
from kvpack.memory.geometry import Geometry
from kvpack.memory.layer import LayerCache
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack


@dataclass(frozen=True, eq=False)
class Chunk:
    """A generated chunk.

    Args:
        index: number of the chunk.
        latents: clean latents, already trimmed to the frames asked for.
        pixels: decoded frames in [-1, 1], or None if nobody needed them yet.
    """

    index: int
    latents: Float[Tensor, "batch channels frames height width"]
    pixels: Float[Tensor, "batch 3 pixel_frames pixel_height pixel_width"] | None


class Run(ABC):
    """One generation in progress; made by `Adapter.run`, which has checked the arguments and encoded the prompt."""

    #: Memory of each guidance branch.
    sessions: dict[str, Session]

    @abstractmethod
    def chunks(self) -> Iterator[Chunk]:
        """Generates chunk by chunk. Between two chunks the pipeline is the stock one."""

    @property
    def count(self) -> int | None:
        """Chunks of the whole video; None if it is endless, or nobody counts them."""
        return None

    @abstractmethod
    def turn(self, prompt: Prompt, *, cut: bool = False) -> None:
        """Another prompt, or another scene, from the next chunk on.

        Raises:
            InvalidOptionError: if it is not for as many videos as the prompt before.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes the next latents of this video, bit-equal to decoding all at once; keeps its own feature cache."""

    def decoded(self, latents: list[Tensor]) -> Iterator[Tensor]:
        """Pixels of a whole video, given each chunk's latents; in one piece where the decoder looks at what comes."""
        return map(self.decode, latents)

    @abstractmethod
    def postprocess(self, pixels: Tensor) -> Any:
        """Pixels in the pipeline's `output_type`."""

    @abstractmethod
    def output(self, frames: Any) -> Any:
        """What the pipeline's call returns around `frames`."""

    @abstractmethod
    def advance(self) -> None:
        """Moves the progress bar by a denoising step."""

    @abstractmethod
    def close(self) -> None:
        """Closes the bar and lets offloading free the models."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Tokens, bytes, selections and seconds so far."""


class Rollout(ABC):
    """A model over kvpack's memory, driven chunk by chunk by training instead of by a pipeline; gradients pass."""

    #: Its memory.
    session: Session

    @abstractmethod
    def attached(self) -> AbstractContextManager[None]:
        """Puts the memory into the transformer; `predict` and `commit` need it, and one rollout at a time has it."""

    @abstractmethod
    def predict(
        self, noisy: Float[Tensor, "batch channels frames height width"], timestep: float, step: int
    ) -> Float[Tensor, "batch channels frames height width"]:
        """Velocity (noise minus clean) that the model predicts for the chunk behind the history.

        Args:
            noisy: the noisy chunk.
            timestep: what the model is told of its noise, in 0..1000.
            step: denoising step; mid blocks are chosen at step 0 and kept in those behind it.
        """

    @abstractmethod
    def commit(self, latents: Float[Tensor, "batch channels frames height width"]) -> None:
        """Writes a clean chunk into history; gradients pass into a compressor, not into what is kept whole."""


class Trainee(ABC):
    """What training must be able to do with a pipeline beside generating."""

    @abstractmethod
    def encode(self, pixels: Float[Tensor, "batch 3 frames height width"]) -> Tensor:
        """Normalised latents `[batch, channels, 1 + m, height, width]` of `1 + 4m` frames in [-1, 1]."""

    @abstractmethod
    def embed(self, captions: list[str]) -> Tensor:
        """Text embeddings `[captions, tokens, width]`."""

    @abstractmethod
    def rollout(
        self, stack: Stack, embeds: Tensor, latent_size: tuple[int, int], buffer: type[LayerCache] = LayerCache
    ) -> Rollout:
        """A new video of `latent_size` (height, width) for each row of text embeddings.

        Args:
            stack: the memory policy.
            embeds: text embeddings.
            latent_size: height and width of the latents.
            buffer: what a layer attends; `GraphLayer` lets gradients through.
        """

    @abstractmethod
    def velocity(self, transformer: Any, noisy: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """What a stock transformer of this family predicts for a whole video at once."""


class Adapter(ABC):
    """What kvpack must know of a model family."""

    name: ClassVar[str]
    #: Arguments, with their defaults, that an enabled pipeline's call takes beside those of the stock one.
    extra_arguments: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def supports(self, pipeline: Any) -> bool:
        """Whether this adapter drives this pipeline."""

    @abstractmethod
    def check(self, pipeline: Any) -> None:
        """Raises `UnsupportedPipelineError` if something is switched on that cannot work."""

    def default_options(self, configs: Mapping[str, Mapping[str, Any]], stack: str) -> Mapping[str, Any]:
        """Options that this model gives a stack by name where the user gives none; those it does not take are left out.

        Args:
            configs: the components' configs.
            stack: name of the stack.
        """
        return {}

    def check_stack(self, pipeline: Any, stack: Memory) -> None:  # noqa: B027  # a family may have nothing to check
        """Raises `InvalidOptionError` if the stack cannot work with this pipeline's model."""

    @abstractmethod
    def geometry(
        self, configs: Mapping[str, Mapping[str, Any]], height: int, width: int, dtype: torch.dtype
    ) -> Geometry:
        """Geometry from the components' configs, for a video of `height` x `width` pixels."""

    @abstractmethod
    def forward_flops(self, configs: Mapping[str, Mapping[str, Any]], query_tokens: int, attended_tokens: int) -> int:
        """Floating-point operations of one forward of `query_tokens` that attends `attended_tokens`."""

    def temporal_scale(self, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """Pixel frames of a latent frame, of which a video's first stands for one alone."""
        return int(configs["vae"].get("scale_factor_temporal", 4))

    def latent_shape(self, configs: Mapping[str, Mapping[str, Any]]) -> LatentShape | None:
        """What the cost of compressing latents depends on; None if nobody counts it."""
        return None

    def model_cost(self, configs: Mapping[str, Mapping[str, Any]], height: int, width: int) -> ModelCost | None:
        """What planning a training depends on, for videos of `height` x `width` pixels; None if nobody counts it."""
        return None

    @abstractmethod
    def run(self, pipeline: Any, stack: Memory, arguments: dict[str, Any], *, streaming: bool) -> Run:
        """Starts a generation. `arguments` are those of the pipeline's own call; `num_frames` None is endless."""

    def trainee(self, pipeline: Any, max_sequence_length: int | None = None) -> Trainee:
        """What training does with this pipeline.

        Args:
            pipeline: the pipeline.
            max_sequence_length: text tokens; the pipeline's own default if None.

        Raises:
            UnsupportedPipelineError: unless an adapter says otherwise.
        """
        raise UnsupportedPipelineError(f"the adapter {self.name} cannot train yet; it has no `trainee`")
