"""One generation of a pipeline: its own call once a chunk, and a commit of what it made."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kvpack.errors import InvalidOptionError, UnsupportedPipelineError
from kvpack.generation.chunks import GeneratedChunk, finite, prolong, require_room, rewinding, trimmed, watched
from kvpack.generation.denoiser import Denoiser
from kvpack.generation.phase import Phase
from kvpack.generation.prompts import Prompt, Shot, scheduled, shots, warn_of_late
from kvpack.generation.threads import require_enabled
from kvpack.memory.base import Memory
from kvpack.memory.geometry import Geometry
from kvpack.memory.ledger import require_length
from kvpack.memory.session import Session

if TYPE_CHECKING:
    from kvpack.generation.adapter import Adapter


class Run(ABC):
    """Generates a video chunk by chunk; a family says what is asked for: all that is abstract, and what else differs.

    Args:
        adapter: the family's adapter.
        pipeline: the enabled pipeline.
        stack: the memory policy.
        arguments: all arguments of the pipeline's call; `num_frames` None is endless.
        streaming: whether chunks are wanted as they come.

    Raises:
        InvalidOptionError: if an argument cannot work; nothing is computed before.
    """

    #: What the pipeline's call returns around the frames.
    output_class: ClassVar[Any] = None
    #: Arguments of the call that are used up once the generation has begun.
    spent: ClassVar[tuple[str, ...]] = ()
    watch: Callable[[], None] = staticmethod(lambda: None)  # called behind a chunk's last denoising step
    frames_beside: int = 0  # pixel frames of the returned video beside those of its latents

    def __init__(
        self, adapter: "Adapter", pipeline: Any, stack: Memory, arguments: dict[str, Any], *, streaming: bool
    ) -> None:
        self.adapter, self.pipeline, self.streaming = adapter, pipeline, streaming
        arguments, schedule = scheduled(arguments)  # a family's own checks know one prompt
        self.call = self.checked(arguments)
        self.output_type, self.total_frames = self.call["output_type"], self.latent_frames()
        self.stack = self.fit(stack)
        height, width = self.frame_size()
        decodes = self.stack.needs_pixels or self.output_type != "latent"
        self._decode: Callable[[Tensor], Tensor] | None = self.decoder(height, width) if decodes else None
        self._decodes_in_loop = self.stack.needs_pixels or (decodes and streaming)
        if self._decodes_in_loop and self._decode is None:
            who = f"the memory {self.stack.name}" if self.stack.needs_pixels else "a stream of pixels"
            raise UnsupportedPipelineError(f"{who} needs each chunk decoded, which {adapter.name} cannot do")
        self.denoiser = self.new_denoiser(self.new_geometry(height, width), self.encode(schedule[0].prompt))
        self.scale = adapter.temporal_scale(adapter.configs(pipeline))
        self.conditioning = require_room(self.beginning(), self.total_frames)  # clean latents it begins with
        self.first_frames = self.first_length()
        #: Prompts to come: the chunk that each begins with, its conditioning, and whether the scene changes.
        self.prompt_changes = [
            (shot.chunk(self.fps, self.stack.chunk_frames, self.scale, self.first_frames), self._later(shot), shot.cut)
            for shot in schedule[1:]  # encoded now, while the text encoder is in
        ]
        warn_of_late(schedule[1:], [chunk for chunk, *_ in self.prompt_changes], self.count)
        self.interrupted = False  # by the pipeline's own `_interrupt`, behind the chunk in which it was set
        self.retries_nan = False  # a chunk that holds NaN is made again of other noise
        self._bar: Any = None
        self.position: tuple[int, int] | None = None  # the coming chunk and its first latent frame; None before any
        self.first_spread: tuple[Tensor, Tensor] | None = None  # means and spreads of the first chunk's channels
        self.between_chunks, self.draws_freely = True, False  # no half-made chunk; torch's own generators were used

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
        # Pipelines hand their scheduler no generator: a sampler that draws noise would draw torch's own.
        with getattr(scheduler, "bound_generator", nullcontext)(self.call.get("generator")):
            yield partial(self.pipeline._kvpack_base.__call__, self.pipeline)  # the enabled one begins a generation

    def phase(self, first: int) -> Phase:
        """Return what the denoising forwards of the chunk are that begins with latent frame `first`."""
        return Phase()

    def fit(self, stack: Memory) -> Memory:
        """Return the stack for the chunks that the call asks for."""
        return stack

    def new_geometry(self, height: int, width: int) -> Geometry:
        """Return the geometry of a video of `height` x `width` pixels."""
        adapter, dtype = self.adapter, self.pipeline.transformer.dtype
        return replace(adapter.geometry(adapter.configs(self.pipeline), height, width, dtype), frames=self.total_frames)

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
        """Pixel frames a second, by which a prompt schedule's seconds are counted; the call's own, if it has any."""
        return float(self.call.get("fps", self.pipeline.packforcing.fps))

    @property
    def steps(self) -> int:
        """How often the pipeline's own call moves the progress bar in a chunk."""
        return int(self.call.get("num_inference_steps", 1))

    def postprocess(self, pixels: Tensor) -> Any:
        """Return frames in the call's `output_type`, batch first."""
        return self.pipeline.video_processor.postprocess_video(pixels, output_type=self.output_type)

    def output(self, frames: Any) -> Any:
        """Return what the pipeline's call returns around `frames`."""
        return self.output_class(frames=frames) if self.call["return_dict"] else (frames,)

    @property
    def sessions(self) -> dict[str, Session]:
        """Memory of each guidance branch."""
        return self.denoiser.sessions

    @property
    def rows(self) -> int:
        """Videos of the batch."""
        return len(next(iter(self.denoiser.conditioning.values())))

    @property
    def count(self) -> int | None:
        """Chunks of the whole video; None if it is endless."""
        return None if self.total_frames is None else self._count(self.total_frames)

    def _count(self, frames: int) -> int:
        return frames and 1 + max(0, -(-(frames - self.first_frames) // self.stack.chunk_frames))

    def chunks(self, first: int = 0) -> Iterator[GeneratedChunk]:
        """Generate chunk after chunk, from latent frame `first` on; between two the pipeline is the stock one."""
        given = 0 if self.conditioning is None else self.conditioning.shape[2]
        done = max(self._count(given), 0 if self.position is None else self.position[0])
        chunks = float("inf") if self.count is None else self.count - done  # tqdm takes infinity for no total
        self._bar = self.pipeline._kvpack_base.progress_bar(self.pipeline, total=chunks * self.steps)
        index, first = self.position or (0, first)
        while first < (self.total_frames or float("inf")) and not self.interrupted:
            self.between_chunks = False  # and it stays so if the chunk raises
            while self.prompt_changes and self.prompt_changes[0][0] <= index:  # several, where shots are short
                self._set_prompt(*self.prompt_changes.pop(0)[1:])
            frames = self.length(index, first)
            with watched() as drawn:  # whether a snapshot must have the states of torch's own generators
                chunk = (self.given if first < given else partial(finite, self))(index, first, frames)
            self.draws_freely |= drawn()
            index, first = self.position = index + 1, first + frames
            yield chunk

    def given(self, index: int, first: int, frames: int) -> GeneratedChunk:
        """Commit a chunk of what the video begins with."""
        assert self.conditioning is not None
        latents = self.conditioning[:, :, first : first + frames]
        return GeneratedChunk(index, latents, self.commit_given(latents))

    @torch.no_grad()
    def commit_given(self, latents: Tensor) -> Tensor | None:
        """Commit latents that were not denoised, and return their pixels if these are wanted as they come."""
        self.denoiser.expect(latents.shape[2])
        with self._driving():
            latents = self.denoiser.agreed(latents)
            pixels = self.decode(latents) if self._decodes_in_loop else None
            self.denoiser.commit(latents, pixels, given=True)
        return None if self.output_type == "latent" else pixels

    @torch.no_grad()
    def generated(self, index: int, first: int, frames: int) -> GeneratedChunk:
        """Denoise a chunk, and commit it if something may follow."""
        self.denoiser.expect(frames)
        with self._driving():
            noise = self.noise(first, frames)  # before the states that another try goes back to
            again = partial(self._denoised, index, first, noise, rewinding(self.call.get("generator")))
            latents = self.denoiser.accepted(self._denoised(index, first, noise), again)
            self.watch()
            pixels = self.decode(latents) if self._decodes_in_loop else None
            self.interrupted = getattr(self.pipeline, "_interrupt", False)  # the next chunk's call takes it back
            # A chunk that is shorter than the rest without being the first is a video's last.
            if not self.interrupted and (first == 0 or frames == self.stack.chunk_frames):
                self.denoiser.commit(latents, pixels)
        chunk = trimmed(GeneratedChunk(index, latents, pixels), self.total_frames, first, self.scale)
        return replace(chunk, pixels=None) if self.output_type == "latent" else chunk

    def _denoised(self, index: int, first: int, noise: Tensor, rewind: Callable[[], None] | None = None) -> Tensor:
        """Return a chunk's latents; another try begins with the same noise."""
        if rewind is not None:
            prolong(self)
            rewind()
        with self.denoiser.timed("denoise"):
            with self.stock() as call, self.denoiser.during(self.phase(first)):
                made = call(**self.stock_call(noise))
            latents = self.denoiser.agreed(made if isinstance(made, Tensor) else made[0])  # before any memory sees them
            self.denoiser.check_finite(latents, index)  # which waits for the device
        return latents

    def set_prompt(self, prompt: Prompt | None, *, cut: bool = False) -> None:
        """Go on under another prompt (None: the one in force) or scene; what a schedule says for later still holds.

        Raises:
            InvalidOptionError: if it is not for as many videos as the prompt before.
        """
        spoken = None if prompt is None else self._later(shots([(0, prompt)])[0])
        self._set_prompt(spoken or self.denoiser.conditioning, cut)

    @torch.no_grad()
    def _set_prompt(self, conditioning: dict[str, Any], cut: bool) -> None:
        with self._driving():
            self.denoiser.set_prompt(conditioning, cut=cut)

    def _later(self, shot: Shot) -> dict[str, Any]:
        conditioning = self.encode(shot.prompt)
        if (rows := len(next(iter(conditioning.values())))) != self.rows:
            raise InvalidOptionError(f"a later prompt is for as many videos as the first, {self.rows}, got {rows}")
        return conditioning

    @contextmanager
    def _driving(self) -> Iterator[None]:
        """Put kvpack's processors into the transformer, and silence the pipeline's own bar and freeing, for a chunk."""
        enabled = require_enabled(self.pipeline)
        before, enabled.driving, enabled.device = enabled.driving, self, None  # None: models may have moved meanwhile
        try:
            self.adapter.check(self.pipeline)  # again for each chunk: anything may be switched on between two of them
            if self.streaming:  # its user's code has run since the last chunk
                self.denoiser.forget_prompt()
            with self.denoiser.seam():
                yield
        finally:
            enabled.driving = before

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels in [-1, 1] of the video's next latents."""
        assert self._decode is not None
        with torch.no_grad(), self.denoiser.timed("decode"):
            return self._decode(latents)

    def decoded(self, latents: list[Tensor]) -> Iterator[Tensor]:
        """Return the pixels of a whole video, given each chunk's latents."""
        return map(self.decode, latents)

    def update(self, steps: int = 1) -> None:
        """Move the progress bar; the pipeline's own call does it through this."""
        self._bar.update(steps)

    def close(self) -> None:
        """Close the progress bar and let offloading free the models."""
        if self._bar is not None:
            self._bar.close()
        self.pipeline.maybe_free_model_hooks()
