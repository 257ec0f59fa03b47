"""One generation of a SkyReels-V2 diffusion-forcing pipeline: the text-to-video call once a chunk."""

import inspect
from typing import Any

import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline
from diffusers.pipelines.skyreels_v2.pipeline_output import SkyReelsV2PipelineOutput
from torch import Tensor

from kvpack.adapters.skyreels_call import checked_call
from kvpack.adapters.skyreels_given import given_latents, given_pixels
from kvpack.adapters.skyreels_memory import SkyReelsMemory
from kvpack.adapters.wan_call import chunk_noise
from kvpack.adapters.wan_given import in_rows
from kvpack.adapters.wan_run import WanRun
from kvpack.geometry import Geometry
from kvpack.pipeline import PackForcingMixin


class TextToVideo(PackForcingMixin, SkyReelsV2DiffusionForcingPipeline):
    """The call that denoises a chunk, on the state of another pipeline; it takes `latents`, which upstream's drops."""

    _kvpack_base = SkyReelsV2DiffusionForcingPipeline

    @classmethod
    def over(cls, pipeline: Any) -> "TextToVideo":
        """Shares everything with a pipeline: components, hooks, interrupt and progress."""
        view = object.__new__(cls)
        object.__setattr__(view, "__dict__", vars(pipeline))
        return view

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        """Given latents are returned alone upstream, where four values are awaited, and later written into."""
        made = super().prepare_latents(*args, **kwargs)
        return made if isinstance(made, tuple) else (made.clone(), made.shape[2], None, 0)


class SkyReelsRun(WanRun):
    """Generates a video chunk by chunk; a chunk is a causal block."""

    output_class = SkyReelsV2PipelineOutput
    #: What upstream returns in front of the frames.
    _clip: Tensor | None = None

    @property
    def _fps(self) -> float:
        return float(self.arguments["fps"])

    def _checked(self, arguments: dict[str, Any], *, streaming: bool) -> dict[str, Any]:
        return checked_call(self.pipeline, arguments, streaming=streaming)

    def _new_memory(self, geometry: Geometry, embeds: dict[str, Tensor]) -> SkyReelsMemory:
        call = self.arguments
        return SkyReelsMemory(self.pipeline, self.stack, geometry, embeds, call["attention_kwargs"], fps=self._fps)

    def _given_latents(self, size: tuple[int, int], rows: int) -> Tensor | None:
        pixels = given_pixels(self.pipeline, self.arguments, size)
        if pixels is None:
            return None
        latents = given_latents(self.pipeline, self.arguments, pixels, rows)
        if pixels.ndim == 5:
            self._clip = in_rows(pixels, rows, self.arguments["num_videos_per_prompt"])
        return latents

    def _noise(self, first: int, frames: int) -> Tensor:
        return chunk_noise(TextToVideo.over(self.pipeline), self.arguments, self._rows, first, frames)

    def _upstream(self, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the text-to-video call, for one short video without blocks."""
        known = inspect.signature(SkyReelsV2DiffusionForcingPipeline.__call__).parameters
        short = {"ar_step": 0, "causal_block_size": None, "overlap_history": None}
        longest = self.pipeline.vae_scale_factor_temporal * self.stack.chunk_frames
        return {**{name: value for name, value in call.items() if name in known}, **short, "base_num_frames": longest}

    def _stock_call(self, arguments: dict[str, Any]) -> Any:
        return TextToVideo.over(self.pipeline)(**arguments)

    def postprocess(self, pixels: Tensor) -> Any:
        """Frames in the call's `output_type`, the first behind the clip that the video goes on from, as upstream's."""
        clip, self._clip = self._clip, None
        return super().postprocess(pixels if clip is None else torch.cat([clip, pixels.to(clip)], dim=2))
