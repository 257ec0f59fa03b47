"""One generation of a SkyReels-V2 diffusion-forcing pipeline: the text-to-video call once a chunk."""

import inspect
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline
from diffusers.pipelines.skyreels_v2.pipeline_output import SkyReelsV2PipelineOutput
from torch import Tensor

from kvpack.adapters.skyreels.call import check_end, checked_call
from kvpack.adapters.skyreels.conditioning import given_latents, given_pixels, image_pixels
from kvpack.adapters.skyreels.denoiser import SkyReelsMemory
from kvpack.adapters.wan.call import chunk_noise
from kvpack.adapters.wan.conditioning import in_rows
from kvpack.adapters.wan.run import WanRun
from kvpack.generation.adapter import Chunk
from kvpack.memory.geometry import Geometry
from kvpack.pipeline.enabled import PackForcingMixin


class _OneChunk(PackForcingMixin):
    """The text-to-video call denoises given noise, which upstream's own fails to."""

    _kvpack: Any

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        """Given latents are returned alone upstream, where four values are awaited, and later written into."""
        made = super().prepare_latents(*args, **kwargs)  # type: ignore[misc]
        return made if isinstance(made, tuple) else (made.clone(), made.shape[2], None, 0)

    def generate_timestep_matrix(self, *args: Any, **kwargs: Any) -> Any:
        """A frame that the video ends with is clean from the first step on."""
        times, indices, updated, intervals = super().generate_timestep_matrix(*args, **kwargs)  # type: ignore[misc]
        if self._kvpack.driving.memory.ends:
            times[:, -1], updated[:, -1] = 0, False
        return times, indices, updated, intervals


def text_to_video(pipeline: Any) -> Any:
    """The text-to-video call over everything of an enabled pipeline: components, hooks, interrupt and progress."""
    base = pipeline._kvpack_base
    base = base if issubclass(base, SkyReelsV2DiffusionForcingPipeline) else SkyReelsV2DiffusionForcingPipeline
    view: Any = object.__new__(type(base.__name__, (_OneChunk, base), {"_kvpack_base": base}))
    object.__setattr__(view, "__dict__", vars(pipeline))
    return view


class SkyReelsRun(WanRun):
    """Generates a video chunk by chunk; a chunk is a causal block."""

    output_class = SkyReelsV2PipelineOutput
    memory: SkyReelsMemory
    #: What upstream returns in front of the frames.
    _clip: Tensor | None = None
    #: Latents of the image that the video ends with: one frame more, in the last chunk.
    _end: Tensor | None = None

    @property
    def _fps(self) -> float:
        return float(self.arguments["fps"])

    @cached_property
    def _text_to_video(self) -> Any:
        return text_to_video(self.pipeline)

    def _checked(self, arguments: dict[str, Any], *, streaming: bool) -> dict[str, Any]:
        return checked_call(self.pipeline, arguments, streaming=streaming)

    def _new_memory(self, geometry: Geometry, embeds: dict[str, Tensor]) -> SkyReelsMemory:
        call = self.arguments
        return SkyReelsMemory(self.pipeline, self.stack, geometry, embeds, call["attention_kwargs"], fps=self._fps)

    def _given_latents(self, size: tuple[int, int], rows: int) -> Tensor | None:
        pixels = given_pixels(self.pipeline, self.arguments, size)
        if pixels is None:
            return None
        image = self.arguments.get("last_image")
        if image is not None:
            assert self.total_frames is not None
            check_end(self.total_frames - 1, self.stack.chunk_frames, self.pipeline.vae_scale_factor_temporal)
            end = image_pixels(self.pipeline, image, size)
            self._end = given_latents(self.pipeline, self.arguments, end, rows)
        if pixels.ndim == 5:
            self._clip = in_rows(pixels, rows, self.arguments["num_videos_per_prompt"])
        return given_latents(self.pipeline, self.arguments, pixels, rows)

    def _end_behind(self, first: int) -> Tensor | None:
        """What the last chunk, if it begins with this frame, ends with."""
        last = self.total_frames is not None and self.total_frames - first < self.stack.chunk_frames
        return self._end if last and first else None

    def _length(self, index: int, first: int) -> int:
        if self.total_frames is None or self._end_behind(first) is None:
            return super()._length(index, first)
        return self.total_frames - first + 1

    def _noise(self, first: int, frames: int) -> Tensor:
        end = self._end_behind(first)
        self.memory.ends = end is not None
        noise = chunk_noise(self._text_to_video, self.arguments, self._rows, first, frames - (end is not None))
        return noise if end is None else torch.cat([noise, end.to(noise)], dim=2)

    def _generate(self, index: int, first: int, frames: int) -> Chunk:
        chunk, end = super()._generate(index, first, frames), self._end_behind(first)
        if end is None or self.arguments["output_type"] != "latent":
            return chunk
        return replace(chunk, latents=torch.cat([chunk.latents, end.to(chunk.latents)], dim=2))  # as upstream

    def _upstream(self, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the text-to-video call, for one short video without blocks."""
        known = inspect.signature(SkyReelsV2DiffusionForcingPipeline.__call__).parameters
        short = {"ar_step": 0, "causal_block_size": None, "overlap_history": None}
        longest = self.pipeline.vae_scale_factor_temporal * self.stack.chunk_frames
        return {**{name: value for name, value in call.items() if name in known}, **short, "base_num_frames": longest}

    def _stock_call(self, arguments: dict[str, Any]) -> Any:
        return self._text_to_video(**arguments)

    def postprocess(self, pixels: Tensor) -> Any:
        """Frames in the call's `output_type`, the first behind the clip that the video goes on from, as upstream's."""
        clip, self._clip = self._clip, None
        return super().postprocess(pixels if clip is None else torch.cat([clip, pixels.to(clip)], dim=2))
