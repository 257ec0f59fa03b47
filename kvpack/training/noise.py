"""The noise levels at which a pipeline denoises, and noise that depends on nothing but its seed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def noise_levels(scheduler: Any, steps: int) -> list[tuple[float, float]]:
    """Sigma in 0..1 and timestep of each denoising step of a flow-matching scheduler.

    >>> from diffusers import FlowMatchEulerDiscreteScheduler
    >>> noise_levels(FlowMatchEulerDiscreteScheduler(shift=1.0), 2)
    [(1.0, 1000.0), (0.001..., 1.0...)]
    """
    scheduler.set_timesteps(steps)
    pairs = zip(scheduler.sigmas[:steps].tolist(), scheduler.timesteps[:steps].tolist(), strict=True)
    return [(float(sigma), float(timestep)) for sigma, timestep in pairs]


def generator(*seeds: int) -> torch.Generator:
    """A generator for one place of a training run: the same numbers wherever a run that was stopped goes on."""
    (state,) = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def noise_like(tensor: Tensor, source: torch.Generator) -> Tensor:
    """Normal noise, drawn on the CPU so that it is the same on every device."""
    return torch.randn(tensor.shape, generator=source).to(tensor.device, tensor.dtype)


def mixed(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """What flow matching has at a noise level."""
    return (1 - sigma) * clean + sigma * noise
