"""The noise levels at which a pipeline denoises, and noise that depends on nothing but its seed."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpack.errors import InvalidOptionError

_RIGHT = "give the model a flow-matching scheduler, e.g. FlowMatchEulerDiscreteScheduler"


def noise_levels(scheduler: Any, steps: int) -> list[tuple[float, float]]:
    """Return sigma in 0..1 and timestep of each denoising step of a flow-matching scheduler.

    Raises:
        InvalidOptionError: if it is none, or its levels do not fall from step to step.

    >>> from diffusers import FlowMatchEulerDiscreteScheduler
    >>> noise_levels(FlowMatchEulerDiscreteScheduler(shift=1.0), 2)
    [(1.0, 1000.0), (0.001..., 1.0...)]
    """
    try:
        scheduler.set_timesteps(steps)
        sigmas, timesteps = scheduler.sigmas[:steps].tolist(), scheduler.timesteps[:steps].tolist()
    except (AttributeError, ValueError) as error:
        raise InvalidOptionError(f"no noise levels from {type(scheduler).__name__}: {error}; {_RIGHT}") from error
    falling = all(after < before for before, after in pairwise([*sigmas, -1.0]))
    if not (falling and sigmas[0] <= 1 and sigmas[-1] >= 0):
        told = ", ".join(f"{sigma:.3g}" for sigma in sigmas)
        raise InvalidOptionError(
            f"{type(scheduler).__name__} has noise levels {told}, not falling from 1 to 0; {_RIGHT}"
        )
    return [(sigma, float(timestep)) for sigma, timestep in zip(sigmas, timesteps, strict=True)]


def generator(*seeds: int) -> torch.Generator:
    """Return a generator seeded by a place in a training run, so that a resumed run draws the same numbers."""
    # Mixed: a sum of the numbers would be the same for two places.
    (state,) = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def noise_like(tensor: Tensor, source: torch.Generator) -> Tensor:
    """Draw normal noise on the CPU, so that it is the same on every device."""
    return torch.randn(tensor.shape, generator=source).to(tensor.device, tensor.dtype)


def mixed(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Interpolate between clean latents and noise: `(1 - sigma) * clean + sigma * noise`."""
    return (1 - sigma) * clean + sigma * noise
