"""Arguments of a `WanPipeline`'s call: checked before anything is computed, prompts encoded, noise drawn."""

import inspect
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from kvpack.errors import InvalidOptionError, NonFiniteLatentsError, require_int

logger = logging.get_logger(__name__)


def checked(pipeline: Any, arguments: dict[str, Any], *, streaming: bool) -> dict[str, Any]:
    """Return all arguments of the pipeline's call, height and width as it adjusts them.

    Raises:
        InvalidOptionError: if an argument cannot work.
        NonFiniteLatentsError: if `latents` hold NaN or infinity.
        ValueError: if the pipeline's own check says so.
    """
    call = dict(arguments)
    if hasattr(call["callback_on_step_end"], "tensor_inputs"):
        call["callback_on_step_end_tensor_inputs"] = call["callback_on_step_end"].tensor_inputs
    own = {**call, "num_frames": 1}  # any number will do
    pipeline.check_inputs(**{name: own[name] for name in inspect.signature(pipeline.check_inputs).parameters})
    if isinstance(call["prompt"], list) and not call["prompt"]:
        raise InvalidOptionError("prompt is an empty list; give at least one prompt")
    if call["output_type"] not in ("latent", "np", "pt", "pil"):
        raise InvalidOptionError(f"output_type must be latent, np, pt or pil, got {call['output_type']!r}")
    require_int("num_inference_steps", call["num_inference_steps"], minimum=1)
    call["num_videos_per_prompt"] = require_int("num_videos_per_prompt", call["num_videos_per_prompt"] or 1, minimum=1)
    if call["num_frames"] is not None:
        require_int("num_frames", call["num_frames"], minimum=1)
    elif not streaming and call["latents"] is None:
        raise InvalidOptionError("num_frames None is endless; use pipe.packforcing.stream(...) or give a number")
    _adjust_size(pipeline, call)
    _check_latents(pipeline, call["latents"])
    return call


def _adjust_size(pipeline: Any, call: dict[str, Any]) -> None:
    patch = pipeline.transformer.config.patch_size[1:]
    given = call["height"], call["width"]
    for name, size in zip(("height", "width"), patch, strict=True):
        multiple = pipeline.vae_scale_factor_spatial * size
        call[name] = call[name] // multiple * multiple
    if given != (call["height"], call["width"]):
        logger.warning(f"height and width {given} are adjusted to {(call['height'], call['width'])} for patchification")


def _check_latents(pipeline: Any, latents: Any) -> None:
    if latents is None:
        return
    config, shape = pipeline.transformer.config, tuple(getattr(latents, "shape", ()))
    _, *patch = config.patch_size
    if len(shape) != 5 or shape[1] != config.in_channels or 0 in shape or shape[3] % patch[0] or shape[4] % patch[1]:
        raise InvalidOptionError(
            f"latents must be [batch, {config.in_channels} channels, frames, height, width] with height and width "
            f"multiples of {patch[0]} and {patch[1]}, got {list(shape) or type(latents).__name__}"
        )
    if not bool(latents.isfinite().all()):
        raise NonFiniteLatentsError("latents hold NaN or infinity; give finite noise")


def latent_frames(pipeline: Any, call: dict[str, Any]) -> int | None:
    """Return latent frames of the whole video, as the pipeline counts them; None is endless."""
    if call["latents"] is not None:
        return int(call["latents"].shape[2])
    frames, scale = call["num_frames"], pipeline.vae_scale_factor_temporal
    if frames is None:
        return None
    if frames % scale != 1:
        logger.warning(f"`num_frames - 1` has to be divisible by {scale}. Rounding to the nearest number.")
    return int(frames) // scale + 1


def frame_size(pipeline: Any, call: dict[str, Any]) -> tuple[int, int]:
    """Return height and width in pixels; those of `latents` where they are given."""
    if call["latents"] is None:
        return call["height"], call["width"]
    height, width = call["latents"].shape[3:]
    return height * pipeline.vae_scale_factor_spatial, width * pipeline.vae_scale_factor_spatial


@torch.no_grad()
def encode_prompts(pipeline: Any, call: dict[str, Any]) -> dict[str, Tensor]:
    """Return text embeddings of each guidance branch, a row for each video.

    Raises:
        InvalidOptionError: if the batch of `latents` does not go with that of the prompts.
    """
    guided, videos = call["guidance_scale"] > 1.0, call["num_videos_per_prompt"]
    cond, uncond = pipeline.encode_prompt(
        prompt=call["prompt"],
        negative_prompt=call["negative_prompt"],
        do_classifier_free_guidance=guided,
        num_videos_per_prompt=videos,
        prompt_embeds=call["prompt_embeds"],
        negative_prompt_embeds=call["negative_prompt_embeds"],
        max_sequence_length=call["max_sequence_length"],
        device=pipeline._execution_device,
    )
    branches = {"cond": (cond, call["prompt_embeds"])}
    if guided:
        branches["uncond"] = (uncond, call["negative_prompt_embeds"])
    # The pipeline repeats prompts for videos, but not embeddings that are given.
    embeds = {
        name: each.to(pipeline._execution_device, pipeline.transformer.dtype).repeat_interleave(
            1 if given is None else videos, dim=0
        )
        for name, (each, given) in branches.items()
    }
    return _same_batch(embeds, call["latents"])


def _same_batch(embeds: dict[str, Tensor], latents: Tensor | None) -> dict[str, Tensor]:
    """Repeat what is one row, as the pipeline: a prompt serves any batch of latents, a negative one any of prompts."""
    rows = max(each.shape[0] for each in embeds.values())
    if latents is not None and rows == 1:
        rows = latents.shape[0]
    batches = {f"{name} embeddings": each.shape[0] for name, each in embeds.items()}
    if any(batch not in (1, rows) for batch in batches.values()) or (latents is not None and latents.shape[0] != rows):
        if latents is not None:
            batches["latents"] = latents.shape[0]
        raise InvalidOptionError(f"batches do not go together: {', '.join(f'{k} {v}' for k, v in batches.items())}")
    return {name: each if each.shape[0] == rows else each.repeat(rows, 1, 1) for name, each in embeds.items()}


def chunk_noise(pipeline: Any, call: dict[str, Any], rows: int, first_frame: int, frames: int) -> Tensor:
    """Return the noise of one chunk; drawn for it alone, so that a video's beginning does not depend on its length."""
    given = call["latents"]
    part = given[:, :, first_frame : first_frame + frames] if given is not None else None
    if part is not None and part.shape[2] == frames:
        return part
    noise = pipeline.prepare_latents(
        rows,
        pipeline.transformer.config.in_channels,
        *frame_size(pipeline, call),
        pipeline.vae_scale_factor_temporal * (frames - 1) + 1,
        torch.float32,
        pipeline._execution_device,
        call["generator"],
        None,
    )
    noise = noise[0] if isinstance(noise, tuple) else noise  # some pipelines tell their lengths too
    return noise if part is None else torch.cat([part.to(noise), noise[:, :, part.shape[2] :]], dim=2)
