"""One generation of a `WanPipeline`: the upstream call once a chunk, a commit forward after it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor

from kvpack.adapters.wan.call import checked, chunk_noise, encode_prompts, frame_size, latent_frames, rewinding
from kvpack.adapters.wan.conditioning import check_given, given_latents
from kvpack.adapters.wan.denoiser import WanMemory
from kvpack.adapters.wan.prompt_cache import PromptCache
from kvpack.adapters.wan.vae import StreamingDecoder
from kvpack.errors import InvalidOptionError, NonFiniteLatentsError, UnsupportedPipelineError
from kvpack.generation.adapter import Adapter, Chunk, Run
from kvpack.generation.prompts import Prompt, shots
from kvpack.generation.stats import branch_stats
from kvpack.memory.base import Memory
from kvpack.memory.geometry import Geometry
from kvpack.memory.ledger import require_length


class WanRun(Run):
    """Generates a video chunk by chunk.

    Args:
        adapter: the family's adapter.
        pipeline: a `WanPipeline`.
        stack: the memory policy.
        arguments: all arguments of the pipeline's call; `num_frames` None is endless.
        streaming: whether chunks are decoded as they come.

    Raises:
        InvalidOptionError: if an argument cannot work.
        NonFiniteLatentsError: if `latents` hold NaN or infinity.
    """

    #: What the pipeline's call returns around the frames.
    output_class: ClassVar[Any] = WanPipelineOutput

    def __init__(
        self, adapter: Adapter, pipeline: Any, stack: Memory, arguments: dict[str, Any], *, streaming: bool
    ) -> None:
        self.adapter, self.pipeline, self.stack = adapter, pipeline, stack
        spoken = "prompt_embeds" if arguments["prompt"] is None else "prompt"
        schedule = shots(arguments[spoken])
        self.arguments = self._checked({**arguments, spoken: schedule[0].prompt}, streaming=streaming)
        needs_pixels = stack.needs_pixels
        self.decodes_in_loop = needs_pixels or (streaming and arguments["output_type"] != "latent")
        self.interrupted = False
        self._bar: Any = None
        self.total_frames = latent_frames(pipeline, self.arguments)
        size = height, width = frame_size(pipeline, self.arguments)
        decodes = arguments["output_type"] != "latent" or needs_pixels
        self.decoder = StreamingDecoder(pipeline.vae, height, width) if decodes else None
        configs = {"transformer": pipeline.transformer.config, "vae": pipeline.vae.config}
        geometry = adapter.geometry(configs, height, width, pipeline.transformer.dtype)
        embeds = encode_prompts(pipeline, self.arguments)
        self.memory = self._new_memory(geometry, embeds)
        self.prompt = self.memory.prompt = PromptCache()
        self.streaming = streaming
        self.sessions, self.seconds = self.memory.sessions, self.memory.seconds
        #: Clean latents that the video begins with.
        self.given = self._given(size, self._rows)
        self.first_frames = self._first_frames()
        scale, fps = pipeline.vae_scale_factor_temporal, self._fps
        #: What is to come: the chunk that it begins with, embeddings, and whether the scene changes.
        self._turns = [
            (shot.chunk(fps, stack.chunk_frames, scale, self.first_frames), self._embeds(shot.prompt), shot.cut)
            for shot in schedule[1:]
        ]

    def chunks(self) -> Iterator[Chunk]:
        """Generates chunk after chunk; between two of them the pipeline is the stock one."""
        given = 0 if self.given is None else self.given.shape[2]
        chunks = float("inf") if self.count is None else self.count - self._count(given)
        steps = chunks * self.arguments["num_inference_steps"]
        self._bar = self.pipeline._kvpack_base.progress_bar(self.pipeline, total=steps)
        index = first = 0
        while (self.total_frames is None or first < self.total_frames) and not self.interrupted:
            while self._turns and self._turns[0][0] <= index:
                self._turn(*self._turns.pop(0)[1:])
            frames = self._length(index, first)
            self.memory.expect(frames)
            yield self._commit_given(index, first, frames) if first < given else self._generate(index, first, frames)
            first, index = first + frames, index + 1

    @property
    def count(self) -> int | None:
        """Chunks of the whole video."""
        return None if self.total_frames is None else self._count(self.total_frames)

    def _count(self, frames: int) -> int:
        """Chunks of so many latent frames."""
        return frames and 1 + max(0, -(-(frames - self.first_frames) // self.stack.chunk_frames))

    def _length(self, index: int, first: int) -> int:
        return self.stack.chunk_frames if index else self.first_frames

    @property
    def _rows(self) -> int:
        return next(iter(self.memory.embeds.values())).shape[0]

    @property
    def _fps(self) -> float:
        return float(self.pipeline.packforcing.fps)

    def _checked(self, arguments: dict[str, Any], *, streaming: bool) -> dict[str, Any]:
        """All arguments of the call, checked before anything is computed."""
        check_given(self.pipeline, arguments)
        return checked(self.pipeline, arguments, streaming=streaming)

    def _new_memory(self, geometry: Geometry, embeds: dict[str, Tensor]) -> WanMemory:
        """The memory of this generation."""
        return WanMemory(self.pipeline, self.stack, geometry, embeds, self.arguments["attention_kwargs"])

    def _given_latents(self, size: tuple[int, int], rows: int) -> Tensor | None:
        """Clean latents that every video of the batch begins with."""
        return given_latents(self.pipeline, self.arguments, size, rows)

    def _given(self, size: tuple[int, int], rows: int) -> Tensor | None:
        """The same, checked."""
        given = self._given_latents(size, rows)
        if given is not None and self.total_frames is not None and given.shape[2] >= self.total_frames:
            raise InvalidOptionError(
                f"what is given has {given.shape[2]} latent frames, but the whole video has {self.total_frames}; "
                "give a larger num_frames, which counts those that are given"
            )
        return given

    def _first_frames(self) -> int:
        """Latent frames of the first chunk: chunks that are given are whole but for the first."""
        frames = self.stack.chunk_frames
        if self.given is None:
            return require_length(self.pipeline.packforcing.first_chunk_frames or frames, frames)
        return (self.given.shape[2] - 1) % frames + 1

    def turn(self, prompt: Prompt, *, cut: bool = False) -> None:
        """Another prompt, or another scene, from the next chunk on; what a schedule says for later still holds."""
        (shot,) = shots([(0, prompt)])
        self._turn(self._embeds(shot.prompt), cut)

    def _embeds(self, prompt: Prompt | None) -> dict[str, Tensor]:
        spoken = (
            {"prompt": None, "prompt_embeds": prompt}
            if isinstance(prompt, Tensor)
            else {"prompt": prompt, "prompt_embeds": None}
        )
        embeds = encode_prompts(self.pipeline, {**self.arguments, **spoken})
        rows, wanted = (each["cond"].shape[0] for each in (embeds, self.memory.embeds))
        if rows != wanted:
            raise InvalidOptionError(f"a later prompt is for as many videos as the first, {wanted}, got {rows}")
        return embeds

    @torch.no_grad()
    def _turn(self, embeds: dict[str, Tensor], cut: bool) -> None:
        with self._driving():
            self.memory.turn(embeds, cut=cut)

    def close(self) -> None:
        """Closes the progress bar and lets offloading free the models."""
        if self._bar is not None:
            self._bar.close()
        self.pipeline.maybe_free_model_hooks()

    def advance(self) -> None:
        """One denoising step is done."""
        self._bar.update()

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1] of the video's next latents."""
        assert self.decoder is not None
        with torch.no_grad(), self.memory.timed("decode"):
            return self.decoder(latents)

    def postprocess(self, pixels: Tensor) -> Any:
        """Frames in the call's `output_type`, batch first."""
        return self.pipeline.video_processor.postprocess_video(pixels, output_type=self.arguments["output_type"])

    def output(self, frames: Any) -> Any:
        """What the pipeline's call returns."""
        return self.output_class(frames=frames) if self.arguments["return_dict"] else (frames,)

    def stats(self) -> dict[str, Any]:
        """Tokens of one branch, bytes of all, and seconds of each phase."""
        return branch_stats(self.stack.name, self.sessions, self.seconds)

    @torch.no_grad()
    def _commit_given(self, index: int, first: int, frames: int) -> Chunk:
        assert self.given is not None
        latents = self.given[:, :, first : first + frames]
        with self._driving():
            pixels = self.decode(latents) if self.decodes_in_loop else None
            self.memory.commit(latents, pixels, given=True)
        return Chunk(index, latents, None if self.arguments["output_type"] == "latent" else pixels)

    @torch.no_grad()
    def _generate(self, index: int, first: int, frames: int) -> Chunk:
        noise = self._noise(first, frames)
        with self._driving():
            latents = self._reviewed(index, noise)
            pixels = self.decode(latents) if self.decodes_in_loop else None
            # A chunk that is shorter than the rest without being the first is a video's last: nothing goes on from it.
            if not self.pipeline._interrupt and (index == 0 or frames == self.stack.chunk_frames):
                self.memory.commit(latents, pixels)
            self.interrupted = self.pipeline._interrupt
        keep = latents.shape[2] if self.total_frames is None else min(latents.shape[2], self.total_frames - first)
        if pixels is not None:
            scale = self.pipeline.vae_scale_factor_temporal
            pixels = pixels[:, :, : keep * scale - (scale - 1 if index == 0 else 0)]
        return Chunk(index, latents[:, :, :keep], None if self.arguments["output_type"] == "latent" else pixels)

    def _noise(self, first: int, frames: int) -> Tensor:
        """Noise of a chunk."""
        return chunk_noise(self.pipeline, self.arguments, self._rows, first, frames)

    def _reviewed(self, index: int, noise: Tensor) -> Tensor:
        """Clean latents that the memory accepts; each try begins with the same noise."""
        rewind = rewinding(self.arguments["generator"])

        def make(retry: int) -> Tensor:
            if retry:
                self._bar.total += self.arguments["num_inference_steps"]
                rewind()
            return self._denoised(index, noise)

        return self.memory.accepted(make)

    def _denoised(self, index: int, noise: Tensor) -> Tensor:
        with self.memory.timed("denoise"):
            latents = self._call_upstream(noise)
        self._check_finite(index, latents)
        return latents

    def _check_finite(self, index: int, latents: Tensor) -> None:
        if not bool(latents.isfinite().all()):
            self.memory.check_policies()  # a policy is the likelier cause
            raise NonFiniteLatentsError(
                f"chunk {index} holds NaN or infinity after denoising; nothing of it was committed. "
                "Check the weights, the dtype and the callbacks"
            )

    def _call_upstream(self, noise: Tensor) -> Tensor:
        pipeline, call = self.pipeline, self.arguments
        scale = pipeline.vae_scale_factor_temporal
        changed = {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": self.memory.embeds["cond"],
            "negative_prompt_embeds": self.memory.embeds.get("uncond"),
            "num_videos_per_prompt": 1,
            "latents": noise,
            "num_frames": scale * (noise.shape[2] - 1) + 1,
            "output_type": "latent",
            "return_dict": False,
            "callback_on_step_end": self._callback if call["callback_on_step_end"] is not None else None,
            **self._for_chunk(noise.shape[2]),
        }
        bind = getattr(pipeline.scheduler, "bound_generator", nullcontext)
        with bind(call["generator"]) if bind is not nullcontext else nullcontext():
            (latents,) = self._stock_call({**self._upstream(call), **changed})
        return latents

    def _stock_call(self, arguments: dict[str, Any]) -> Any:
        return self.pipeline._kvpack_base.__call__(self.pipeline, **arguments)

    def _for_chunk(self, frames: int) -> dict[str, Any]:
        """Further arguments of the upstream call that makes a chunk of so many latent frames."""
        return {}

    def _upstream(self, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments that the stock pipeline knows."""
        return {name: value for name, value in call.items() if name not in self.adapter.extra_arguments}

    def _callback(self, _: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The user's callback; embeddings that it replaces stay replaced for the chunks to come."""
        outputs = self.arguments["callback_on_step_end"](self.pipeline, step, timestep, tensors)
        self.prompt.forget()  # a callback may change weights
        for branch, name in (("cond", "prompt_embeds"), ("uncond", "negative_prompt_embeds")):
            if outputs.get(name) is not None and branch in self.memory.embeds:
                self.memory.embeds[branch] = outputs[name].to(self.pipeline.transformer.dtype)
        return outputs

    @contextmanager
    def _driving(self) -> Iterator[None]:
        """Kvpack's processors in the transformer, and the pipeline's own bar and freeing silenced, for one chunk."""
        enabled = vars(self.pipeline).get("_kvpack")
        if enabled is None:
            raise UnsupportedPipelineError("packforcing was disabled while a stream was open; close the stream first")
        self.adapter.check(self.pipeline)  # again for each chunk: anything may be switched on between two of them
        if self.streaming:
            self.prompt.forget()
        enabled.driving = self
        try:
            with self.memory.attached():
                yield
        finally:
            enabled.driving = None
