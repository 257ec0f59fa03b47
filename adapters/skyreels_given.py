"""The image or clip that a SkyReels-V2 video goes on from, encoded by the pipeline's own method for its very bits."""

from typing import Any

import torch
from torch import Tensor

from kvpack.adapters.wan_given import in_rows
from kvpack.errors import InvalidOptionError, NonFiniteLatentsError


def given_pixels(pipeline: Any, call: dict[str, Any], size: tuple[int, int]) -> Tensor | None:
    """The call's image `[batch, 3, height, width]` or clip `[batch, 3, frames, height, width]` in [-1, 1].

    Args:
        pipeline: one of the three pipelines.
        call: arguments of its call.
        size: height and width in pixels.

    Raises:
        InvalidOptionError: if what is taken of a clip has a length that a causal VAE does not have.
        NonFiniteLatentsError: if the pixels hold NaN or infinity.
    """
    height, width = size
    if "image" in call:
        pixels = pipeline.video_processor.preprocess(call["image"], height=height, width=width)
    elif "video" in call:
        pixels = pipeline.video_processor.preprocess_video(call["video"], height=height, width=width)
        _check_length(pipeline, call, pixels)
    else:
        return None
    if not bool(pixels.isfinite().all()):
        raise NonFiniteLatentsError("image or video holds NaN or infinity; give finite pixels")
    return pixels.to(pipeline._execution_device, torch.float32)


@torch.no_grad()
def given_latents(pipeline: Any, call: dict[str, Any], pixels: Tensor, rows: int) -> Tensor:
    """Normalised latents that every video of the batch begins with.

    Args:
        pipeline: one of the three pipelines.
        call: arguments of its call.
        pixels: what `given_pixels` gave.
        rows: videos of the batch.

    Raises:
        InvalidOptionError: if there are neither one nor as many as there are prompts or videos.
    """
    shared = {
        "batch_size": 1,
        "num_channels_latents": pipeline.transformer.config.in_channels,
        "height": pixels.shape[-2],
        "width": pixels.shape[-1],
        "dtype": torch.float32,
        "device": pixels.device,
    }
    if pixels.ndim == 4:
        _, _, latents, _ = pipeline.prepare_latents(pixels, num_frames=1, latents=pixels[:0], **shared)
    else:
        frames = taken_frames(call, pixels)
        scale = pipeline.vae_scale_factor_temporal
        latent_frames = (frames - 1) // scale + 1
        _, _, latents, _ = pipeline.prepare_latents(
            pixels,
            num_frames=frames,
            generator=torch.Generator(),  # noise is drawn too, and not used
            base_latent_num_frames=latent_frames,
            overlap_history=frames,
            overlap_history_latent_frames=latent_frames,
            causal_block_size=1,
            long_video_iter=0,
            **shared,
        )
    # The pipeline, too, keeps them in the transformer's dtype.
    latents = latents.to(pipeline.transformer.dtype).float()
    return in_rows(latents, rows, call["num_videos_per_prompt"])


def taken_frames(call: dict[str, Any], pixels: Tensor) -> int:
    """Frames, the last of a clip, that the video goes on from: all unless `overlap_history` says fewer."""
    return min(call["overlap_history"] or pixels.shape[2], pixels.shape[2])


def _check_length(pipeline: Any, call: dict[str, Any], pixels: Tensor) -> None:
    frames, scale = taken_frames(call, pixels), pipeline.vae_scale_factor_temporal
    if frames % scale != 1:
        fitting = max(frames - 1, 0) // scale * scale + 1
        raise InvalidOptionError(
            f"a video goes on from the last 1 + {scale}m frames of a clip with this VAE, got overlap_history "
            f"{call['overlap_history']} and a clip of {pixels.shape[2]} frames; pass e.g. overlap_history={fitting}"
        )
