"""One generation of an `AnyFlowFARPipeline`: the upstream call once a chunk, with a partition of that chunk alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.pipelines.anyflow.pipeline_output import AnyFlowPipelineOutput
from torch import Tensor

from kvpack.adapters.anyflow_far.chunks import chunks_of, fitted
from kvpack.adapters.anyflow_far.denoiser import AnyFlowFARMemory
from kvpack.adapters.wan.call import frame_size, latent_frames
from kvpack.adapters.wan.conditioning import in_rows
from kvpack.adapters.wan.run import WanRun
from kvpack.adapters.wan.vae import onload
from kvpack.errors import InvalidOptionError, NonFiniteLatentsError
from kvpack.generation.adapter import Adapter
from kvpack.memory.base import Memory
from kvpack.memory.geometry import Geometry


class AnyFlowFARRun(WanRun):
    """Generates a video in the chunks that the call, or the model, asks for.

    Args:
        adapter: the family's adapter.
        pipeline: an `AnyFlowFARPipeline`.
        stack: the memory policy, whose chunks get the length of these.
        arguments: all arguments of the pipeline's call, and the adapter's own.
        streaming: whether chunks are decoded as they come.

    Raises:
        InvalidOptionError: if an argument cannot work.
        NonFiniteLatentsError: if `latents`, `video` or `video_latents` hold NaN or infinity.
    """

    output_class = AnyFlowPipelineOutput
    memory: AnyFlowFARMemory

    def __init__(
        self, adapter: Adapter, pipeline: Any, stack: Memory, arguments: dict[str, Any], *, streaming: bool
    ) -> None:
        self._chunks = chunks_of(pipeline, arguments["chunk_partition"])
        super().__init__(adapter, pipeline, fitted(stack, self._chunks), arguments, streaming=streaming)
        self.memory.upstream_padding = bool(self.arguments["upstream_padding"])

    def _new_memory(self, geometry: Geometry, embeds: dict[str, Tensor]) -> AnyFlowFARMemory:
        return AnyFlowFARMemory(self.pipeline, self.stack, geometry, embeds, self.arguments["attention_kwargs"])

    def _checked(self, arguments: dict[str, Any], *, streaming: bool) -> dict[str, Any]:
        call = super()._checked(arguments, streaming=streaming)
        if not call["use_kv_cache"]:
            raise InvalidOptionError(
                "use_kv_cache=False cannot work here, since kvpack is the cache; leave it out, or call "
                "pipe.disable_packforcing() first"
            )
        schedule = call["sigmas"] if call["sigmas"] is not None else call["timesteps"]
        if schedule is not None:
            call["num_inference_steps"] = len(schedule)
        total = latent_frames(self.pipeline, call)
        if total is not None:
            call["num_frames"] = self.pipeline.vae_scale_factor_temporal * (total - 1) + 1
        self._chunks.check(total, _given_frames(self.pipeline, call))
        return call

    def _given_latents(self, size: tuple[int, int], rows: int) -> Tensor | None:
        given, pipeline = self.arguments["video_latents"], self.pipeline
        if self.arguments["video"] is not None:
            onload(pipeline.vae)
            with torch.no_grad():
                given = pipeline.encode_video(self.arguments["video"], height=size[0], width=size[1])
        if given is None:
            return None
        if not bool(given.isfinite().all()):
            raise NonFiniteLatentsError("video or video_latents hold NaN or infinity; give finite ones")
        latents = given.transpose(1, 2).to(pipeline._execution_device, pipeline.transformer.dtype)
        return in_rows(latents, rows, self.arguments["num_videos_per_prompt"])

    def _first_frames(self) -> int:
        if self._chunks.partition is not None:
            return self._chunks.first
        if self.given is not None:
            return super()._first_frames()
        return self.pipeline.packforcing.first_chunk_frames or self._chunks.first

    def _length(self, index: int, first: int) -> int:
        frames = super()._length(index, first)
        return frames if self.total_frames is None else min(frames, self.total_frames - first)

    def _call_upstream(self, noise: Tensor) -> Tensor:
        self.memory.begin_chunk()
        return super()._call_upstream(noise)

    def _for_chunk(self, frames: int) -> dict[str, Any]:
        return {
            "video": None,
            "video_latents": None,
            "use_kv_cache": False,  # or it would allocate keys and values of its own
            "chunk_partition": [frames],
            "callback_on_step_end": self._step_done,
        }

    def _step_done(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.advance()
        if self.arguments["callback_on_step_end"] is None:
            return {}
        return self._callback(pipeline, step, timestep, tensors)

    @contextmanager
    def _driving(self) -> Iterator[None]:
        """The upstream call makes bars of its own, two for each chunk; they are silenced by their config alone."""
        attributes = vars(self.pipeline)
        bars = attributes.get("_progress_bar_config")
        self.pipeline._progress_bar_config = {**(bars or {}), "disable": True}
        try:
            with super()._driving():
                yield
        finally:
            self.pipeline._progress_bar_config = bars
            if bars is None:
                del attributes["_progress_bar_config"]


def _given_frames(pipeline: Any, call: dict[str, Any]) -> int:
    """Latent frames that the call gives.

    Raises:
        InvalidOptionError: if they do not have the video's size.
    """
    video, latents = call["video"], call["video_latents"]
    if video is not None:
        return (int(video.shape[1]) - 1) // pipeline.vae_scale_factor_temporal + 1
    if latents is None:
        return 0
    channels = pipeline.transformer.config.in_channels
    height, width = (side // pipeline.vae_scale_factor_spatial for side in frame_size(pipeline, call))
    if latents.ndim != 5 or tuple(latents.shape[2:]) != (channels, height, width) or not latents.shape[1]:
        raise InvalidOptionError(
            f"video_latents must be [batch, frames, {channels} channels, {height}, {width}], got {list(latents.shape)}"
        )
    return int(latents.shape[1])
