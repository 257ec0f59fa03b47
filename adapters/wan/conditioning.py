"""Frames that a video begins with: an image or a clip, encoded, that is committed before anything is generated."""

from typing import Any

import torch
from torch import Tensor

from kvpack.adapters.offload import onload
from kvpack.adapters.wan.vae import encode, require_vae
from kvpack.errors import InvalidOptionError
from kvpack.media.pixels import image_pixels, video_pixels


def check_conditioning(pipeline: Any, call: dict[str, Any]) -> None:
    """Refuse an image and a clip together, and a clip of a length that a causal VAE does not have.

    Raises:
        InvalidOptionError: if the two cannot be what a video begins with.
    """
    image, video = call.get("image"), call.get("video")
    if image is not None and video is not None:
        raise InvalidOptionError("a video begins with an image or with a clip; give image or video, not both")
    if video is None:
        return
    frames, scale = _clip(pipeline, call).shape[2], pipeline.vae_scale_factor_temporal
    if frames % scale != 1:
        raise InvalidOptionError(
            f"video must have 1 + {scale}m frames for this VAE, got {frames}; e.g. {(frames - 1) // scale * scale + 1}"
        )


@torch.no_grad()
def conditioning_latents(pipeline: Any, call: dict[str, Any], size: tuple[int, int], rows: int) -> Tensor | None:
    """Return normalised latents of the frames that every video of the batch begins with; None if nothing is given.

    Args:
        pipeline: has a VAE and a video processor.
        call: arguments of the pipeline's call with `image` and `video`.
        size: height and width in pixels.
        rows: videos of the batch.

    Raises:
        InvalidOptionError: if there are neither one nor as many as there are prompts or videos.
        NonFiniteLatentsError: if the pixels hold NaN or infinity.
    """
    image, video = call.get("image"), call.get("video")
    if image is None and video is None:
        return None
    require_vae(pipeline.vae, "image= or video=")
    # The VAE takes -1..1, and pictures are read as 0..1.
    pixels = _clip(pipeline, call, size) if image is None else 2 * image_pixels(image, *size).unsqueeze(2) - 1
    onload(pipeline.vae)
    latents = encode(pipeline.vae, pixels.to(pipeline._execution_device, pipeline.vae.dtype)).float()
    return expand_batch(latents, rows, call["num_videos_per_prompt"] or 1)


def expand_batch(latents: Tensor, rows: int, videos: int) -> Tensor:
    """Return one beginning for all videos, or one for each prompt or video, as one for each video.

    Raises:
        InvalidOptionError: if there are neither one nor as many as there are prompts or videos.
    """
    count = latents.shape[0]
    if count not in (1, rows) and count * videos != rows:
        raise InvalidOptionError(f"give one image or clip, or one for each of {rows} videos, got {count}")
    # A prompt's videos are neighbours in the batch, as encode_prompt repeats them.
    return latents if count == rows else latents.repeat_interleave(rows // count, dim=0)


def _clip(pipeline: Any, call: dict[str, Any], size: tuple[int, int] = (16, 16)) -> Tensor:
    """Return a clip's pixels in [-1, 1], `[batch, 3, frames, height, width]`."""
    return (2 * video_pixels(call["video"], *size, fps=pipeline.packforcing.fps) - 1).transpose(1, 2)
