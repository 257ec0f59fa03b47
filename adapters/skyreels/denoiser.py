"""A SkyReels-V2 transformer over kvpack's memory: one time for all frames of a chunk, and no mask."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor
from torch import Tensor

from kvpack.adapters.wan.denoiser import WanDenoiser


class SkyReelsDenoiser(WanDenoiser):
    """A `SkyReelsV2Transformer3DModel` over the sessions of all guidance branches.

    Args:
        fps: pixel frames a second, of which the model is told if it was trained so.
        args: those of `WanDenoiser`.
        kwargs: those of `WanDenoiser`.
    """

    cross_processor = SkyReelsV2AttnProcessor

    def __init__(self, *args: Any, fps: float = 24.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fps_kind = int(fps != 16)  # all that the model is told of it

    @contextmanager
    def seam(self) -> Iterator[None]:
        """Put kvpack's processors into the transformer, and blocks of one frame, for which it makes no mask."""
        blocks = self.transformer.config.num_frame_per_block  # given back: save_pretrained writes the config
        with self.transformer.register_forward_pre_hook(self._with_one_time, with_kwargs=True):
            try:
                self._set_blocks(1)  # else a mask, all True, of 100 MB for 5 frames of 34x60 tokens
                with super().seam():
                    yield
            finally:
                self._set_blocks(blocks)

    def _set_blocks(self, frames: int) -> None:
        if self.transformer.config.num_frame_per_block != frames:
            self.transformer._set_ar_attention(frames)

    def _with_one_time(self, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Let the frames of a chunk share their time, so that no modulation of every token is made of it."""
        times = kwargs["timestep"]
        # With a given end the last frame has a time of its own, 0.
        of_frames = times.ndim == 2 and self.phase is not None and self.phase.end_given
        one = times[:, 0] if times.ndim == 2 and not of_frames else times
        # Under diffusion forcing the model asks for times [rows, frames], without it for [rows].
        changed = {"timestep": one, "enable_diffusion_forcing": of_frames, "fps": self._fps_rows(times)}
        return args, {**kwargs, **changed}

    def _fps_rows(self, rows: Tensor) -> list[int]:
        return [self._fps_kind] * rows.shape[0]

    def modulation(self, branch: str, times: Tensor) -> Tensor:
        """Return shifts and scales of a layer's input at these times, `[batch, 6, width]`."""
        modulation = super().modulation(branch, times)
        if not self.transformer.config.inject_sample_info:
            return modulation
        kinds = torch.tensor(self._fps_rows(times), device=times.device)
        of_rate = self.transformer.fps_projection(self.transformer.fps_embedding(kinds))
        return modulation + of_rate.unflatten(1, (6, -1))  # (b, 6, width)
