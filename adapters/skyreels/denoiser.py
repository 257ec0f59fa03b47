"""A SkyReels-V2 transformer over kvpack's memory: one time for all frames of a chunk, no mask, steps counted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext
from torch import Tensor

from kvpack.adapters.wan.denoiser import WanMemory
from kvpack.memory.base import Memory
from kvpack.memory.geometry import Geometry
from kvpack.memory.layer import AttendingLayer, LayerCache


class SkyReelsMemory(WanMemory):
    """Memory of one generation by every guidance branch.

    Args:
        pipeline: one of the three pipelines.
        stack: the memory policy.
        geometry: of its transformer.
        embeds: text embeddings of each guidance branch, the first of which is forwarded first in every step.
        attention_kwargs: passed on to the transformer.
        buffer: what a layer attends; another one lets gradients through.
        fps: pixel frames a second, of which the model is told if it was trained so.

    Raises:
        InvalidOptionError: if the compressor cannot work with this model.
    """

    def __init__(
        self,
        pipeline: Any,
        stack: Memory,
        geometry: Geometry,
        embeds: dict[str, Tensor],
        attention_kwargs: Mapping[str, Any] | None = None,
        buffer: type[LayerCache] = LayerCache,
        fps: float = 24.0,
    ) -> None:
        super().__init__(pipeline, stack, geometry, embeds, attention_kwargs, buffer)
        self._fps_kind = int(fps != 16)  # all that the model hears of it
        self._steps = 0
        #: Whether the last frame of the chunk is given, and clean at every step.
        self.ends = False

    def accepted(self, make: Callable[[int], Tensor]) -> Tensor:
        """Clean latents of a chunk; its steps are counted from 0 in every try."""

        def from_the_first_step(retry: int) -> Tensor:
            self._steps = 0
            return make(retry)

        return super().accepted(from_the_first_step)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Kvpack's processors in the transformer, and blocks of one frame in its config, for which it makes no mask."""
        blocks = self.transformer.config.num_frame_per_block
        handle = self.transformer.register_forward_pre_hook(self._with_one_time, with_kwargs=True)
        try:
            self._set_blocks(1)
            with super().attached():
                yield
        finally:
            self._set_blocks(blocks)
            handle.remove()

    def _set_blocks(self, frames: int) -> None:
        if self.transformer.config.num_frame_per_block != frames:
            self.transformer._set_ar_attention(frames)

    def _with_one_time(self, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The frames of a chunk share their time, so that no modulation of every token is made of it."""
        times = kwargs["timestep"]
        of_frames = times.ndim == 2 and self.ends
        one = times[:, 0] if times.ndim == 2 and not of_frames else times
        changed = {"timestep": one, "enable_diffusion_forcing": of_frames, "fps": self._fps_rows(times)}
        return args, {**kwargs, **changed}

    def _fps_rows(self, rows: Tensor) -> list[int]:
        return [self._fps_kind] * rows.shape[0]

    def _memory_for(self, context: CacheContext) -> Sequence[AttendingLayer]:
        """Counts the steps, which this pipeline does not tell."""
        if context.step_index is None:
            self._steps += context.name == next(iter(self.embeds))
            context = replace(context, step_index=max(0, self._steps - 1))
        return super()._memory_for(context)

    def _modulation(self, branch: str, times: Tensor) -> Tensor:
        modulation = super()._modulation(branch, times)
        if not self.transformer.config.inject_sample_info:
            return modulation
        kinds = torch.tensor(self._fps_rows(times), device=times.device)
        told = self.transformer.fps_projection(self.transformer.fps_embedding(kinds))
        return modulation + told.unflatten(1, (6, -1))
