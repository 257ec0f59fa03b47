"""One call of a SkyReels-V2 diffusion-forcing pipeline: the text-to-video call once a chunk."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline
from diffusers.pipelines.skyreels_v2.pipeline_output import SkyReelsV2PipelineOutput
from torch import Tensor

from kvpack.adapters.skyreels.conditioning import conditioning_latents, conditioning_pixels, image_pixels
from kvpack.adapters.skyreels.denoiser import SkyReelsDenoiser
from kvpack.adapters.wan.conditioning import expand_batch
from kvpack.adapters.wan.run import WanRun
from kvpack.errors import InvalidOptionError, require_int
from kvpack.generation.chunks import GeneratedChunk, with_chunk_frames
from kvpack.generation.phase import Phase
from kvpack.memory.base import Memory
from kvpack.pipeline.enabled import PackForcingMixin


class _OneChunk(PackForcingMixin):
    """The text-to-video call denoises given noise, which upstream's own fails to."""

    _kvpack: Any

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        """Return four values, and latents that may be written into, where upstream returns given latents alone."""
        made = super().prepare_latents(*args, **kwargs)  # type: ignore[misc]
        return made if isinstance(made, tuple) else (made.clone(), made.shape[2], None, 0)

    def generate_timestep_matrix(self, *args: Any, **kwargs: Any) -> Any:
        """Return upstream's times; a frame that the video ends with is clean from the first step on."""
        times, indices, updated, intervals = super().generate_timestep_matrix(*args, **kwargs)  # type: ignore[misc]
        if self._kvpack.driving.denoiser.phase.end_given:
            times[:, -1], updated[:, -1] = 0, False  # not stepped either: its latents stay as given
        return times, indices, updated, intervals


def text_to_video(pipeline: Any) -> Any:
    """Return the text-to-video pipeline over all of an enabled one: components, hooks, interrupt and progress."""
    base = pipeline._kvpack_base
    # A subclass of the text-to-video pipeline keeps its own call.
    base = base if issubclass(base, SkyReelsV2DiffusionForcingPipeline) else SkyReelsV2DiffusionForcingPipeline
    view: Any = object.__new__(type(base.__name__, (_OneChunk, base), {"_kvpack_base": base}))
    # The very dictionary: an interrupt of either is one of both.
    object.__setattr__(view, "__dict__", vars(pipeline))
    return view


class SkyReelsRun(WanRun):
    """Generates a video chunk by chunk; a chunk is a causal block."""

    output_class = SkyReelsV2PipelineOutput
    #: What upstream returns in front of the frames.
    _clip: Tensor | None = None
    #: Latents of the image that the video ends with: one frame more, in the last chunk.
    _end: Tensor | None = None

    @cached_property
    def noise_pipeline(self) -> Any:
        """The text-to-video pipeline, whichever of the three this is."""
        return text_to_video(self.pipeline)

    def checked(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments of the call, checked before anything is computed."""
        # Upstream wants overlap_history beyond base_num_frames; there is no such length here.
        call = super().checked({**arguments, "base_num_frames": 1})
        _check_schedule(call)
        if call["overlap_history"] is not None:
            require_int("overlap_history", call["overlap_history"], minimum=1)
        if not call["fps"] > 0:
            raise InvalidOptionError(f"fps must be > 0, got {call['fps']}")
        if call.get("last_image") is not None and call["num_frames"] is None:
            raise InvalidOptionError("last_image is where a video ends, but num_frames None is endless; give a number")
        if call.get("image_embeds") is not None:
            raise InvalidOptionError("image_embeds are not used by this pipeline; pass image instead")
        if "video" in call and call["video"] is None:
            raise InvalidOptionError("video is None; give the clip that the video goes on from")
        return call

    def check_beginning(self, call: dict[str, Any]) -> None:
        """Leave it to the pipeline: a clip may have any length, of which the last frames are taken."""

    def fit(self, stack: Memory) -> Memory:
        """Return the stack for the causal blocks of the call, or else of the checkpoint."""
        given, trained = self.call["causal_block_size"], self.pipeline.transformer.config.num_frame_per_block
        if given is not None:
            frames = require_int("causal_block_size", given, minimum=1)
        else:
            frames = trained if trained > 1 else stack.chunk_frames  # 1 says that it was trained without blocks
        return with_chunk_frames(stack, frames, "causal_block_size")

    def denoiser_class(self) -> Callable[..., SkyReelsDenoiser]:
        """Return what makes the denoiser, at the call's frame rate."""
        return partial(SkyReelsDenoiser, fps=self.fps)

    def beginning(self) -> Tensor | None:
        """Return the latents of the image or clip that the video begins with, and keep those that it ends with."""
        pixels = conditioning_pixels(self.pipeline, self.call, self.frame_size())
        if pixels is None:
            return None
        image = self.call.get("last_image")
        if image is not None:
            assert self.total_frames is not None
            _check_end(self.total_frames - 1, self.stack.chunk_frames, self.pipeline.vae_scale_factor_temporal)
            end = image_pixels(self.pipeline, image, self.frame_size())
            self._end = conditioning_latents(self.pipeline, self.call, end, self.rows)
        if pixels.ndim == 5:
            self._clip = expand_batch(pixels, self.rows, self.call["num_videos_per_prompt"])
            # The clip is returned in front of the frames.
            self.frames_beside = 0 if self.output_type == "latent" else pixels.shape[2]
        return conditioning_latents(self.pipeline, self.call, pixels, self.rows)

    def _end_behind(self, first: int) -> Tensor | None:
        """Return what the last chunk ends with, if it is the one that begins with frame `first`."""
        last = self.total_frames is not None and self.total_frames - first < self.stack.chunk_frames
        return self._end if last and first else None  # the first chunk is the image's own

    def length(self, index: int, first: int) -> int:
        """Return the length of a chunk; the last has the frame that the video ends with."""
        if self.total_frames is None or self._end_behind(first) is None:
            return super().length(index, first)
        return self.total_frames - first + 1

    def phase(self, first: int) -> Phase:
        """Return a denoising phase that knows whether the chunk's last frame is given."""
        return Phase(end_given=self._end_behind(first) is not None)

    def noise(self, first: int, frames: int) -> Tensor:
        """Return the noise of a chunk, and behind it the frame that the video ends with."""
        end = self._end_behind(first)
        noise = super().noise(first, frames - (end is not None))
        return noise if end is None else torch.cat([noise, end.to(noise)], dim=2)

    def generated(self, index: int, first: int, frames: int) -> GeneratedChunk:
        """Denoise a chunk; latents have the frame that the video ends with, as upstream's."""
        chunk, end = super().generated(index, first, frames), self._end_behind(first)
        if end is None or self.output_type != "latent":
            return chunk
        return replace(chunk, latents=torch.cat([chunk.latents, end.to(chunk.latents)], dim=2))

    @contextmanager
    def stock(self) -> Iterator[Callable[..., Any]]:
        """Give the text-to-video call, whichever of the three pipelines it is."""
        # For what it sets up around a call; the call itself is the text-to-video pipeline's.
        with super().stock():
            yield self.noise_pipeline

    def stock_call(self, noise: Tensor) -> dict[str, Any]:
        """Return arguments of the text-to-video call, for one short video without blocks."""
        known = inspect.signature(SkyReelsV2DiffusionForcingPipeline.__call__).parameters
        # None leaves the config's block of one frame, which the seam has set; a number would set another.
        short = {"ar_step": 0, "causal_block_size": None, "overlap_history": None}
        longest = self.scale * self.stack.chunk_frames  # no call is longer, or upstream would ask for overlap_history
        every = {**super().stock_call(noise), **short, "base_num_frames": longest}
        # Without `image`, `video` and the like, which only the other two pipelines take.
        return {name: value for name, value in every.items() if name in known}

    def postprocess(self, pixels: Tensor) -> Any:
        """Return frames in the call's `output_type`, the first behind the clip that the video goes on from."""
        clip, self._clip = self._clip, None  # in front of the first frames only
        return super().postprocess(pixels if clip is None else torch.cat([clip, pixels.to(clip)], dim=2))


def _check_schedule(call: dict[str, Any]) -> None:
    steps, ar_step = call["num_inference_steps"], require_int("ar_step", call["ar_step"])
    if 0 < ar_step < steps:
        raise InvalidOptionError(
            f"ar_step {ar_step} denoises several blocks at once, but kvpack denoises a block when the one before it is "
            f"clean; pass ar_step=0, or ar_step={steps} which upstream does the same with"
        )
    if call["addnoise_condition"] != 0:
        raise InvalidOptionError(
            f"addnoise_condition {call['addnoise_condition']} adds noise to the history, but kvpack keeps the history "
            "of clean frames; pass addnoise_condition=0"
        )


def _check_end(frames: int, chunk_frames: int, scale: int) -> None:
    """Refuse a last image that would have a chunk of its own: in a causal model nothing would see it.

    Args:
        frames: latent frames behind the image that the video begins with.
        chunk_frames: latent frames of a chunk.
        scale: pixel frames of a latent frame.

    Raises:
        InvalidOptionError: if the chunks before it leave it alone.
    """
    if not frames or frames % chunk_frames:
        return
    if chunk_frames == 1:
        advice = "pass a causal_block_size of 2 or more"
    else:
        fewer, more = (1 + scale * (frames + each) for each in (-1, 1))
        advice = f"pass num_frames={fewer} or {more}, or another causal_block_size"
    raise InvalidOptionError(
        f"last_image would be alone in the last chunk, behind {frames} latent frames in chunks of {chunk_frames}, "
        f"and no frame would go towards it; {advice}"
    )
