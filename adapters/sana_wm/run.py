"""One call of a `SanaWMLTX2Refiner`: the upstream call once a block, behind the raw frames of its sink."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpack.adapters.sana_wm.denoiser import BRANCH, SanaWMDenoiser, Text
from kvpack.adapters.sana_wm.rope import LTX2Rotary
from kvpack.errors import (
    InvalidOptionError,
    NonFiniteLatentsError,
    UnsupportedPipelineError,
    require_choice,
    require_int,
)
from kvpack.generation.adapter import call_signature
from kvpack.generation.chunks import GeneratedChunk, with_chunk_frames
from kvpack.generation.prompts import Prompt
from kvpack.generation.run import Run
from kvpack.memory.base import Memory
from kvpack.memory.geometry import Geometry


class SanaWMRun(Run):
    """Refines a video block by block; the first chunk is the raw sink and the first block."""

    def checked(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments of the call, with a generator, checked before anything is computed.

        Raises:
            InvalidOptionError: if an argument cannot work.
            NonFiniteLatentsError: if `sana_latent` holds NaN or infinity.
        """
        call, pipeline = dict(arguments), self.pipeline
        if pipeline.vae is None:
            call["output_type"] = "latent"  # whatever was asked for, as upstream
        for name in ("sink_size", "block_size"):
            call[name] = require_int(name, call[name], minimum=1)
        if call["sink_size"] > call["block_size"]:
            raise InvalidOptionError(
                f"sink_size must be at most block_size {call['block_size']}, got {call['sink_size']}; "
                "keep more frames for good by the stack's sink_frames"
            )
        if pipeline.packforcing.first_chunk_frames not in (None, call["sink_size"]):
            raise InvalidOptionError(
                f"the refiner's first chunk is its sink; give sink_size={pipeline.packforcing.first_chunk_frames} to "
                f"the call in the place of packforcing.first_chunk_frames, got {call['sink_size']}"
            )
        trained = call_signature(pipeline._kvpack_base).parameters["kv_max_frames"].default
        # Refused and not ignored: it would have no effect here.
        if call["kv_max_frames"] != trained:
            raise InvalidOptionError(
                f"kv_max_frames is the stock pipeline's window, got {call['kv_max_frames']}, but this pipeline's "
                f'memory is its stack; give the stack\'s options, e.g. enable_packforcing("sana-wm", '
                f"window_frames={call['kv_max_frames']})"
            )
        require_choice("output_type", call["output_type"], ("latent", "np", "pt", "pil"))
        if not (isinstance(call["fps"], int | float) and math.isfinite(call["fps"]) and call["fps"] > 0):
            raise InvalidOptionError(f"fps must be a number > 0, got {call['fps']!r}")
        if len(call["sigmas"]) < 2:
            raise InvalidOptionError(f"sigmas need a step at least, e.g. (0.9, 0.0), got {call['sigmas']!r}")
        if self.streaming and call["output_type"] != "latent":
            raise InvalidOptionError(
                "the refiner's decoder looks at frames to come, so pixels cannot be streamed; "
                'stream with output_type="latent" and decode the whole afterwards'
            )
        _check_latents(pipeline, call)
        if call["generator"] is None:  # one for all blocks, as upstream's
            call["generator"] = torch.Generator(device=pipeline._execution_device).manual_seed(42)
        return call

    def fit(self, stack: Memory) -> Memory:
        """Return the stack for the call's blocks."""
        fitted = with_chunk_frames(stack, self.call["block_size"], "block_size")
        self.adapter.check_stack(self.pipeline, fitted)
        return fitted

    def latent_frames(self) -> int:
        """Return the frames of the raw video."""
        return int(self.call["sana_latent"].shape[2])

    def frame_size(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        _, rows, columns = self.pipeline.transformer.config.vae_scale_factors
        height, width = self.call["sana_latent"].shape[3:]
        return height * rows, width * columns

    def new_geometry(self, height: int, width: int) -> Geometry:
        """Return the geometry, with RoPE in the call's seconds."""
        geometry = super().new_geometry(height, width)
        assert isinstance(geometry.rotary, LTX2Rotary)
        return replace(geometry, rotary=replace(geometry.rotary, fps=self.fps))

    @torch.no_grad()
    def encode(self, prompt: Prompt | None) -> dict[str, Text]:
        """Return the text of the one branch, for every row of the batch."""
        if not isinstance(prompt, str):
            raise InvalidOptionError(f"the refiner's prompt is one text, got {type(prompt).__name__}")
        pipeline, rows = self.pipeline, self.call["sana_latent"].shape[0]
        device, dtype = pipeline._execution_device, pipeline.transformer.dtype
        # One text for the batch, as the call encodes it.
        embeds, mask = pipeline._encode_prompt(prompt, device=device, dtype=dtype)
        return {BRANCH: Text(embeds.expand(rows, -1, -1), mask.expand(rows, -1))}

    def new_denoiser(self, geometry: Geometry, conditioning: dict[str, Any]) -> SanaWMDenoiser:
        """Return the transformer over a new memory."""
        return SanaWMDenoiser(self.pipeline, self.stack, geometry, conditioning, self.fps)

    def first_length(self) -> int:
        """Return the latent frames of the sink and the first block."""
        # The sink has no chunk of its own, for nothing of it is generated.
        return int(self.call["sink_size"] + self.stack.chunk_frames)

    def length(self, index: int, first: int) -> int:
        """Return the latent frames of a block."""
        return min(self.stack.chunk_frames, self.latent_frames() - first)

    @property
    def frames_beside(self) -> int:  # type: ignore[override]
        """The frames that `decoded` leaves out, counted down."""
        return 0 if self.output_type == "latent" else -int(self.call["sink_size"])

    @property
    def _sink(self) -> Tensor:
        return self.call["sana_latent"][:, :, : self.call["sink_size"]]

    def chunks(self, first: int = 0) -> Iterator[GeneratedChunk]:
        """Refine block after block; they begin behind the sink."""
        return super().chunks(first or self.call["sink_size"])  # a run that goes on has its own `position`

    @torch.no_grad()
    def generated(self, index: int, first: int, frames: int) -> GeneratedChunk:
        """Refine a block; the raw sink is committed before the first one, and returned in front of it."""
        if index:
            return super().generated(index, first, frames)
        sink = self._sink.to(self.pipeline._execution_device, self.pipeline.transformer.dtype).contiguous()
        if not self.denoiser.frames:  # or a try before this one has
            self.commit_given(sink)
        chunk = super().generated(index, first, frames)
        return replace(chunk, latents=torch.cat([sink, chunk.latents], dim=2))

    def noise(self, first: int, frames: int) -> Tensor:
        """Return the raw sink and block, to which the call itself adds noise."""
        # The call takes the first frames of its latents for the sink.
        return torch.cat([self._sink, self.call["sana_latent"][:, :, first : first + frames]], dim=2)

    def stock_call(self, noise: Tensor) -> dict[str, Any]:
        """Return the call's own arguments, for a video of this block alone."""
        return {**self.call, "sana_latent": noise, "output_type": "latent"}

    @contextmanager
    def stock(self) -> Iterator[Callable[..., Any]]:
        """Give the call without its encoder and its commits; it returns the block alone."""
        text = self.denoiser.conditioning[BRANCH]
        shadows: dict[str, Callable[..., Any]] = {
            "_encode_prompt": lambda *_, **__: (text.embeds, text.mask),
            "_capture_block_kv": _skip,  # the run commits, once the chunk is accepted
        }
        with super().stock() as call, _shadowed(self.pipeline, shadows):
            yield lambda **arguments: call(**arguments)[:, :, self.call["sink_size"] :]  # it returns the sink in front

    def decode(self, latents: Tensor) -> Tensor:
        """Refuse: the decoder looks at frames to come."""
        raise UnsupportedPipelineError("the refiner's decoder looks at frames to come; decode the whole video at once")

    def decoded(self, latents: list[Tensor]) -> Iterator[Tensor]:
        """Return pixels in [-1, 1] of the whole video at once, without the sink, as upstream's."""
        with torch.no_grad(), self.denoiser.timed("decode"):
            pixels = self.pipeline._decode_latents(torch.cat(latents, dim=2))[:, :, self.call["sink_size"] :]
        return iter([pixels])

    def output(self, frames: Any) -> Any:
        """Return what the pipeline's call returns: latents of all videos, or the frames of one."""
        return frames if self.output_type == "latent" else frames[0]


def _check_latents(pipeline: Any, call: dict[str, Any]) -> None:
    latents, config = call["sana_latent"], pipeline.transformer.config
    channels, patch = config.in_channels // config.patch_size**2, config.patch_size
    shape = tuple(latents.shape) if isinstance(latents, Tensor) else ()
    if len(shape) != 5 or shape[1] != channels or 0 in shape or shape[3] % patch or shape[4] % patch:
        raise InvalidOptionError(
            f"sana_latent must be [batch, {channels} channels, frames, height, width] with height and width multiples "
            f"of {patch}, got {list(shape) or type(latents).__name__}"
        )
    if shape[2] <= call["sink_size"]:
        raise InvalidOptionError(
            f"sana_latent must have more frames than sink_size={call['sink_size']}, got {shape[2]}"
        )
    if shape[0] > 1 and call["output_type"] != "latent":
        raise InvalidOptionError(
            f"the refiner returns pixels of one video, but sana_latent has a batch of {shape[0]}; "
            'give output_type="latent"'
        )
    if not bool(latents.isfinite().all()):
        raise NonFiniteLatentsError("sana_latent holds NaN or infinity; give finite latents")


@contextmanager
def _shadowed(pipeline: Any, methods: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Let a pipeline's call find other methods on the instance than on its class."""
    before = dict(vars(pipeline))  # somebody else may have shadowed the same
    vars(pipeline).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(pipeline)[name]
        vars(pipeline).update({name: before[name] for name in methods if name in before})


def _skip(*, clean_block: Tensor, kv_cache: Any, **_: Any) -> None:
    """Stand in for upstream's capture of keys and values, which kvpack keeps instead: it reads back none at all."""
    nothing = clean_block.new_empty(clean_block.shape[0], 0, 1)
    for index in range(len(kv_cache)):
        kv_cache.get(index).store_captured_pre_rope(nothing, nothing)
        kv_cache.get(index).store_captured_post_rope(nothing, nothing)
