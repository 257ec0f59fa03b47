"""What a SkyReels-V2 video goes on from or ends with, encoded by the pipeline's own method for its very bits."""

from typing import Any

import torch
from torch import Tensor

from kvpack.adapters.wan.conditioning import expand_batch
from kvpack.adapters.wan.vae import require_vae
from kvpack.logging import get_logger
from kvpack.media.pixels import image_pixels as image_pixels_of
from kvpack.media.pixels import video_pixels

logger = get_logger(__name__)


def conditioning_pixels(pipeline: Any, call: dict[str, Any], size: tuple[int, int]) -> Tensor | None:
    """Return the call's image `[batch, 3, height, width]` or clip `[batch, 3, frames, height, width]` in [-1, 1].

    Args:
        pipeline: one of the three pipelines.
        call: arguments of its call.
        size: height and width in pixels.

    Raises:
        NonFiniteLatentsError: if the pixels hold NaN or infinity.
    """
    if "image" in call:
        return image_pixels(pipeline, call["image"], size)
    if "video" not in call:
        return None
    pixels = (2 * video_pixels(call["video"], *size, fps=float(call["fps"])) - 1).transpose(1, 2)
    scale, taken = pipeline.vae_scale_factor_temporal, taken_frames(pipeline, call, pixels)
    if taken != (call["overlap_history"] or pixels.shape[2]):
        logger.warning(f"a video goes on from 1 + {scale}m frames of a clip: here from the last {taken}")
    return _on_device(pipeline, pixels)


def image_pixels(pipeline: Any, image: Any, size: tuple[int, int]) -> Tensor:
    """Return an image in this size, `[batch, 3, height, width]` in [-1, 1]; NaN raises `NonFiniteLatentsError`."""
    return _on_device(pipeline, 2 * image_pixels_of(image, *size) - 1)


def _on_device(pipeline: Any, pixels: Tensor) -> Tensor:
    return pixels.to(pipeline._execution_device, torch.float32)


@torch.no_grad()
def conditioning_latents(pipeline: Any, call: dict[str, Any], pixels: Tensor, rows: int) -> Tensor:
    """Return normalised latents that every video of the batch begins or ends with.

    Args:
        pipeline: one of the three pipelines.
        call: arguments of its call.
        pixels: what `conditioning_pixels` or `image_pixels` gave.
        rows: videos of the batch.

    Raises:
        InvalidOptionError: if there are neither one nor as many as there are prompts or videos.
    """
    require_vae(pipeline.vae, "image= or video=")
    shared = {
        "batch_size": 1,  # encoded once; `expand_batch` repeats it
        "num_channels_latents": pipeline.transformer.config.in_channels,
        "height": pixels.shape[-2],
        "width": pixels.shape[-1],
        "dtype": torch.float32,
        "device": pixels.device,
    }
    if pixels.ndim == 4:
        # Given latents, of which there are none, so that it draws no noise.
        _, _, latents, _ = pipeline.prepare_latents(pixels, num_frames=1, latents=pixels[:0], **shared)
    else:
        frames = taken_frames(pipeline, call, pixels)
        latent_frames = (frames - 1) // pipeline.vae_scale_factor_temporal + 1
        _, _, latents, _ = pipeline.prepare_latents(
            pixels,
            num_frames=frames,
            generator=torch.Generator(),  # noise is drawn too, and not used
            base_latent_num_frames=latent_frames,
            overlap_history=frames,
            overlap_history_latent_frames=latent_frames,
            causal_block_size=1,  # or it would cut frames that fill no block
            long_video_iter=0,  # the iteration that encodes the clip
            **shared,
        )
    # The pipeline, too, keeps them in the transformer's dtype.
    latents = latents.to(pipeline.transformer.dtype).float()
    return expand_batch(latents, rows, call["num_videos_per_prompt"])


def taken_frames(pipeline: Any, call: dict[str, Any], pixels: Tensor) -> int:
    """Return how many frames, the last of a clip, the video goes on from: `1 + 4m` of all, or of `overlap_history`."""
    scale, most = pipeline.vae_scale_factor_temporal, pixels.shape[2]
    return int((min(call["overlap_history"] or most, most) - 1) // scale * scale + 1)
