"""What a family says of its pipeline's call; `Run` does the rest."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from kvpack.generation.denoiser import Denoiser
from kvpack.generation.phase import Phase
from kvpack.generation.prompts import Prompt, Shot, shots
from kvpack.memory.base import Memory
from kvpack.memory.geometry import Geometry
from kvpack.memory.ledger import require_length

if TYPE_CHECKING:
    from kvpack.generation.adapter import Adapter


class Call(ABC):
    """One call of a family's pipeline. What is abstract must be said; the rest may be said otherwise.

    In the order in which it is asked for: `parse_prompt`, `checked`, `fit`, `latent_frames`, `frame_size`, `decoder`,
    `new_geometry`, `encode`, `new_denoiser`, `beginning` and `first_length`; then `length`, `noise`, `phase`, `stock`
    and `stock_call` for each chunk; `postprocess` and `output` for what is returned.
    """

    #: What the pipeline's call returns around the frames.
    output_class: ClassVar[Any] = None

    adapter: "Adapter"
    pipeline: Any
    #: The stack, for chunks of the length that the call asks for.
    stack: Memory
    #: All arguments, checked.
    call: dict[str, Any]
    output_type: str
    #: Latent frames of the whole video; None if it is endless.
    total_frames: int | None
    denoiser: Denoiser
    #: Clean latents that the video begins with.
    conditioning: Tensor | None
    #: Latent frames of the first chunk.
    first_frames: int

    @abstractmethod
    def checked(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments of the call, checked before anything is computed."""

    @abstractmethod
    def latent_frames(self) -> int | None:
        """Return the latent frames of the whole video; None if it is endless."""

    @abstractmethod
    def frame_size(self) -> tuple[int, int]:
        """Return height and width in pixels."""

    @abstractmethod
    def encode(self, prompt: Prompt | None) -> dict[str, Any]:
        """Return what the transformer is told of a prompt, by guidance branch; a row for each video."""

    @abstractmethod
    def new_denoiser(self, geometry: Geometry, conditioning: dict[str, Any]) -> Denoiser:
        """Return the transformer over a new memory."""

    @abstractmethod
    def noise(self, first: int, frames: int) -> Tensor:
        """Return what the chunk of `frames` latent frames from `first` on is denoised from."""

    @abstractmethod
    def stock_call(self, noise: Tensor) -> dict[str, Any]:
        """Return arguments of the pipeline's own call that make this chunk alone, as latents."""

    @contextmanager
    def stock(self) -> Iterator[Callable[..., Any]]:
        """Give the pipeline's own call, for one chunk; it returns latents, or a tuple of them."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        with getattr(scheduler, "bound_generator", nullcontext)(self.call.get("generator")):
            yield partial(self.pipeline._kvpack_base.__call__, self.pipeline)

    def phase(self, first: int) -> Phase:
        """Return what the denoising forwards of the chunk are that begins with latent frame `first`."""
        return Phase()

    def parse_prompt(self, prompt: Any) -> list[Shot]:
        """Return the shots of a prompt, which is one for the whole video or a schedule of them."""
        return shots(prompt)

    def fit(self, stack: Memory) -> Memory:
        """Return the stack for the chunks that the call asks for."""
        return stack

    def new_geometry(self, height: int, width: int) -> Geometry:
        """Return the geometry of a video of `height` x `width` pixels."""
        return self.adapter.geometry(
            self.adapter.configs(self.pipeline), height, width, self.pipeline.transformer.dtype
        )

    def decoder(self, height: int, width: int) -> Callable[[Tensor], Tensor] | None:
        """Return what decodes a video's next latents, bit-equal to decoding all at once; None if nothing can."""
        return None

    def beginning(self) -> Tensor | None:
        """Return clean latents that every video of the batch begins with; None if there are none."""
        return None

    def first_length(self) -> int:
        """Return the latent frames of the first chunk; chunks that are given are whole but for the first."""
        frames = self.stack.chunk_frames
        if self.conditioning is None:
            return require_length(self.pipeline.packforcing.first_chunk_frames or frames, frames)
        return (self.conditioning.shape[2] - 1) % frames + 1

    def length(self, index: int, first: int) -> int:
        """Return the latent frames of a chunk that is denoised, which may reach beyond the video's end."""
        return self.stack.chunk_frames if index else self.first_frames

    @property
    def fps(self) -> float:
        """Pixel frames a second, by which a prompt schedule's seconds are counted."""
        return float(self.pipeline.packforcing.fps)

    @property
    def steps(self) -> int:
        """How often the pipeline's own call moves the progress bar in a chunk."""
        return int(self.call["num_inference_steps"])

    def postprocess(self, pixels: Tensor) -> Any:
        """Return frames in the call's `output_type`, batch first."""
        return self.pipeline.video_processor.postprocess_video(pixels, output_type=self.output_type)

    def output(self, frames: Any) -> Any:
        """Return what the pipeline's call returns around `frames`."""
        return self.output_class(frames=frames) if self.call["return_dict"] else (frames,)
