"""What a measure is held against: the truth through a VAE, and videos that must not win."""

from typing import Any

import numpy as np

from kvpack.media.video import Frames

CHUNK = 4  # frames that a latent frame of a causal VAE stands for, after the first one


def floors(truth: Frames, seed: int = 0) -> dict[str, Frames]:
    """Make videos that must not win, as long as `truth`: noise, a frozen first frame, and shuffled frames."""
    rng = np.random.default_rng(seed)
    return {
        "noise": rng.integers(0, 256, truth.shape, np.uint8),
        "frozen": np.repeat(truth[:1], len(truth), axis=0),
        "shuffled": truth[rng.permutation(len(truth))],
    }


def through_vae(vae: Any, frames: Frames) -> Frames:
    """Encode and decode a video [T, H, W, 3]: the upper bound of any generator with this VAE.

    Args:
        vae: a causal video VAE of diffusers, such as a pipeline's `vae`.
        frames: the video; its last frame is repeated up to a whole latent frame, and what was added is cut off.
    """
    import torch

    lacking = -(len(frames) - 1) % CHUNK
    whole = np.concatenate([frames, np.repeat(frames[-1:], lacking, axis=0)])
    video = torch.from_numpy(whole).permute(3, 0, 1, 2)[None].to(vae.device, vae.dtype) / 127.5 - 1
    with torch.no_grad():
        out = vae.decode(vae.encode(video).latent_dist.mode()).sample[0].float()
    pixels = ((out / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0)[: len(frames)].cpu().numpy()
