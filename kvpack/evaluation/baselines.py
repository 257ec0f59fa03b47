"""What a measure says of the truth, of the truth through a VAE, and of videos that must not win."""

from typing import Any

import numpy as np

from kvpack.evaluation.facts import Facts
from kvpack.evaluation.measures import METRICS, measures
from kvpack.evaluation.observer import Observer
from kvpack.media.video import Frames

TRUTH, CEILING = "truth", "truth through the VAE"
CHUNK = 4  # frames that a latent frame of a causal VAE stands for, after the first one


def baselines(truth: Frames, facts: Facts, vae: Any = None, seed: int = 0) -> dict[str, dict[str, float]]:
    """Measure a true video [T, H, W, 3], its reconstruction by a VAE, and the floors, over all frames.

    Args:
        truth: the video.
        facts: what is known of it.
        vae: a causal video VAE of diffusers; without, there is no such row.
        seed: of the noise and of the shuffling.
    """
    videos = {TRUTH: truth}
    if vae is not None:
        videos[CEILING] = through_vae(vae, truth)
    videos.update(floors(truth, seed))
    return {name: _all_of(video, facts) for name, video in videos.items()}


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


def against_truth(row: dict[str, float], truth: dict[str, float]) -> float:
    """Return the mean ratio of a video's measures to the truth's, each at most 1; an unknown measure counts as 0."""
    known = [name for name in METRICS if truth[name] > 0]
    shares = [min(1.0, row[name] / truth[name]) if np.isfinite(row[name]) else 0.0 for name in known]
    return float(np.mean(shares)) if shares else float("nan")


def _all_of(video: Frames, facts: Facts) -> dict[str, float]:
    observer = Observer(facts)
    observer.add(video)
    observation = observer.finish()
    return measures(observation, 0, observation.frames)
