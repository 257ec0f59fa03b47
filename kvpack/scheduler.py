"""The sampler of few-step distilled checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FlowMatchLCMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config

from kvpack.errors import InvalidOptionError

# A pipeline that is loaded with a scheduler from here looks for SchedulerMixin beside it.
__all__ = ["FlowMatchFewStepScheduler", "SchedulerMixin"]


class FlowMatchFewStepScheduler(FlowMatchLCMScheduler):
    """Fixed sigmas, predict x0, re-noise: the sampler of Self-Forcing (arXiv 2506.08009) and its descendants.

    Differs from `FlowMatchLCMScheduler`: `set_timesteps(4)` gives the trained sigmas and not a linear ramp to 0, and
    the noise comes from the call's generator, so that the same seed gives the same video.

    Args:
        sigmas: noise levels before the shift, falling; one denoising step each.
        shift: time shift of the flow.
        num_train_timesteps: scale of the timesteps.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, sigmas: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25), shift: float = 5.0, num_train_timesteps: int = 1000
    ) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, shift=shift)
        # The parent registers its own view of the config; ours is what is saved.
        self.register_to_config(sigmas=list(sigmas), shift=shift, num_train_timesteps=num_train_timesteps)
        self._generator: torch.Generator | list[torch.Generator] | None = None

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Leave out the parent's options, which a config holds but which have no effect here."""
        own = {"sigmas", "shift", "num_train_timesteps"}
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k in own or k[0] == "_"}, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Use the fixed sigmas unless others are given.

        Raises:
            InvalidOptionError: if a number of steps is asked for that the checkpoint was not distilled to.
        """
        # Pipelines pass a number of steps only; the parent would make a linear ramp of it.
        if sigmas is None and timesteps is None:
            sigmas = list(self.config["sigmas"])
            if num_inference_steps not in (None, len(sigmas)):
                raise InvalidOptionError(
                    f"this scheduler has {len(sigmas)} fixed sigmas {sigmas}; pass num_inference_steps={len(sigmas)}, "
                    f"got {num_inference_steps}"
                )
        super().set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu, timesteps=timesteps)

    def step(
        self,
        model_output: Any,
        timestep: Any,
        sample: Any,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Step as the parent does, with noise from the bound generator where none is passed."""
        return super().step(model_output, timestep, sample, generator or self._generator, return_dict)  # type: ignore[arg-type]

    @contextmanager
    def bound_generator(self, generator: torch.Generator | list[torch.Generator] | None) -> Iterator[None]:
        """Draw noise from `generator` inside the block; pipelines do not pass theirs on."""
        before, self._generator = self._generator, generator
        try:
            yield
        finally:
            self._generator = before
