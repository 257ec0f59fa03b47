"""One call of an `AnyFlowFARPipeline`, with a partition of one chunk alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.pipelines.anyflow.pipeline_output import AnyFlowPipelineOutput
from torch import Tensor

from kvpack.adapters.anyflow_far.chunks import Chunks
from kvpack.adapters.anyflow_far.denoiser import AnyFlowFARDenoiser
from kvpack.adapters.offload import onload
from kvpack.adapters.wan.conditioning import expand_batch
from kvpack.adapters.wan.run import WanRun
from kvpack.adapters.wan.vae import require_vae
from kvpack.errors import InvalidOptionError, NonFiniteLatentsError
from kvpack.generation.chunks import with_chunk_frames
from kvpack.logging import get_logger
from kvpack.media.pixels import video_pixels
from kvpack.memory.base import Memory

logger = get_logger(__name__)


class AnyFlowFARRun(WanRun):
    """Generates a video in the chunks that the call, or the model, asks for."""

    output_class = AnyFlowPipelineOutput

    def checked(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments of the call, and find out its chunks."""
        partition, own = arguments["chunk_partition"], Chunks.of(self.pipeline.transformer.config.chunk_partition)
        if not isinstance(partition, Sequence | None):
            raise InvalidOptionError(
                f"chunk_partition must be a list of latent frames, got {partition!r}; e.g. [1, 3, 3]"
            )
        self.partition = replace(own, partition=None) if partition is None else Chunks.of(partition, own.rest)
        given = arguments["video"]
        if given is not None and arguments["video_latents"] is None:  # upstream takes tensors of one shape only
            size = arguments["height"], arguments["width"]
            arguments = {**arguments, "video": video_pixels(given, *size, self.pipeline.packforcing.fps)}
        call = super().checked(arguments)
        if not call["use_kv_cache"]:
            raise InvalidOptionError(
                "use_kv_cache=False cannot work here, since kvpack is the cache; leave it out, or call "
                "pipe.disable_packforcing() first"
            )
        schedule = call["sigmas"] if call["sigmas"] is not None else call["timesteps"]
        # A schedule goes before the number of steps, as upstream; the bar counts these.
        return call if schedule is None else {**call, "num_inference_steps": len(schedule)}

    def fit(self, stack: Memory) -> Memory:
        """Return the stack for the chunks of the call, or else of the model."""
        self.partition.check(self.total_frames, self._conditioning_frames())
        if self.partition.partition is None and stack.chunk_frames != self.partition.rest:
            logger.warning(
                f"chunks have the {self.partition.rest} latent frames of the model's chunk_partition, not the "
                f"{stack.chunk_frames} of the stack; others are asked for by the call's chunk_partition"
            )
        return with_chunk_frames(stack, self.partition.rest, "chunk_partition")

    def denoiser_class(self) -> Callable[..., AnyFlowFARDenoiser]:
        """Return what makes the denoiser, with upstream's padding if the call asks for it."""
        return partial(AnyFlowFARDenoiser, upstream_padding=bool(self.call["upstream_padding"]))

    def beginning(self) -> Tensor | None:
        """Return the latents of the clip that the video begins with."""
        given, pipeline = self.call["video_latents"], self.pipeline
        if self.call["video"] is not None:
            height, width = self.frame_size()
            require_vae(pipeline.vae, "video=")
            onload(pipeline.vae)
            with torch.no_grad():
                given = pipeline.encode_video(self.call["video"], height=height, width=width)
        if given is None:
            return None
        if not bool(given.isfinite().all()):
            raise NonFiniteLatentsError("video or video_latents hold NaN or infinity; give finite ones")
        latents = given.transpose(1, 2).to(pipeline._execution_device, pipeline.transformer.dtype)  # (b, c, f, h, w)
        return expand_batch(latents, self.rows, self.call["num_videos_per_prompt"])

    def _conditioning_frames(self) -> int:
        """Return the latent frames that the call gives.

        Raises:
            InvalidOptionError: if they do not have the video's size.
        """
        video, latents, scale = self.call["video"], self.call["video_latents"], self.pipeline.vae_scale_factor_temporal
        if video is not None:
            return (int(video.shape[1]) - 1) // scale + 1
        if latents is None:
            return 0
        channels = self.pipeline.transformer.config.in_channels
        height, width = (side // self.pipeline.vae_scale_factor_spatial for side in self.frame_size())
        if (
            not isinstance(latents, Tensor)
            or latents.ndim != 5
            or tuple(latents.shape[2:]) != (channels, height, width)
            or not latents.shape[1]
        ):
            raise InvalidOptionError(
                f"video_latents must be [batch, frames, {channels} channels, {height}, {width}], "
                f"got {list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__}"
            )
        return int(latents.shape[1])

    def first_length(self) -> int:
        """Return the length of the first chunk, as the call's partition or else the model's says."""
        if self.partition.partition is not None:
            return self.partition.first
        if self.conditioning is not None:
            return super().first_length()
        return self.pipeline.packforcing.first_chunk_frames or self.partition.first

    def length(self, index: int, first: int) -> int:
        """Return the length of a chunk; the last may be shorter."""
        frames = super().length(index, first)
        return frames if self.total_frames is None else min(frames, self.total_frames - first)

    def stock_call(self, noise: Tensor) -> dict[str, Any]:
        """Return the call's own arguments, for a video of this chunk alone."""
        changed = {
            "video": None,
            "video_latents": None,
            "use_kv_cache": False,  # or it would allocate keys and values of its own
            "chunk_partition": [noise.shape[2]],
            "callback_on_step_end": self.step_done,
        }
        return {**super().stock_call(noise), **changed}

    def step_done(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Move the bar, which the pipeline's own loop does not, and call the user's callback."""
        self.update()
        if self.call["callback_on_step_end"] is None:
            return {}
        return super().step_done(pipeline, step, timestep, tensors)

    @contextmanager
    def stock(self) -> Iterator[Callable[..., Any]]:
        """Give the pipeline's call without its two bars for each chunk, which their config alone can silence."""
        attributes = vars(self.pipeline)
        bars = attributes.get("_progress_bar_config")
        self.pipeline._progress_bar_config = {**(bars or {}), "disable": True}
        try:
            with super().stock() as call:
                yield call
        finally:
            self.pipeline._progress_bar_config = bars
            if bars is None:
                del attributes["_progress_bar_config"]
