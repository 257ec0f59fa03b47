"""How long and how fast a training is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import SchedulerType, get_scheduler

from kvpack.errors import InvalidOptionError, require_choice, require_int

#: Those of diffusers that need no more than the steps; "piecewise_constant" has rules of its own.
SCHEDULES = [each.value for each in SchedulerType if each != SchedulerType.PIECEWISE_CONSTANT]


@dataclass(frozen=True)
class TrainingRecipe:
    """Length, learning rate, batch and seed of a training run.

    Args:
        steps: optimiser steps.
        learning_rate: of the compressor.
        batch: clips a backward pass, in each process.
        accumulation: backward passes a step.
        schedule: of learning rates, one of `SCHEDULES`, e.g. "constant", "cosine" or "linear".
        warmup: steps until the learning rate is reached.
        clip_norm: the largest norm of a step's gradient.
        seed: of the order of clips and of all noise.
        save_every: steps between checkpoints.

    Raises:
        InvalidOptionError: if a number or a word cannot work.
    """

    steps: int = 3000
    learning_rate: float = 1e-4
    batch: int = 1
    accumulation: int = 1
    schedule: str = "constant"
    warmup: int = 0
    clip_norm: float = 1.0
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation", "save_every"):
            require_int(name, getattr(self, name), minimum=1)
        require_choice("schedule", self.schedule, SCHEDULES)
        for name in ("warmup", "seed"):
            require_int(name, getattr(self, name))
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidOptionError(f"{name} must be a number > 0, got {getattr(self, name)}")
        self.rates(0.5)  # as a critic has; refuses what the schedule does

    def rates(self, multiple: float) -> Callable[[int], float]:
        """Return a learner's rate by the step of the run alone: it may take fewer steps, and a run may become longer.

        Args:
            multiple: of the learning rate.
        """
        rate = self.learning_rate * multiple
        unused = torch.optim.AdamW([torch.zeros(())], rate)  # get_scheduler wants one; only its formula is taken
        try:
            schedule: Any = get_scheduler(
                self.schedule, unused, num_warmup_steps=self.warmup, num_training_steps=self.steps
            )
        except ValueError as error:  # a polynomial ends at a rate of its own
            raise InvalidOptionError(f"schedule {self.schedule} does not go with a rate of {rate}: {error}") from error
        (factor,) = schedule.lr_lambdas
        return lambda step: float(rate * factor(step))
