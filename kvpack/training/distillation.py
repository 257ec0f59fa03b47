"""Context distillation: what a model predicts behind packed history should be what it predicts behind all of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvpack.adapter import Rollout, Trainee
from kvpack.packed import PackedBuffer
from kvpack.registry import registry
from kvpack.stack import Stack
from kvpack.training.buffer import Cut, GraphBuffer, backward_history, histories
from kvpack.training.clips import Clip
from kvpack.training.noise import generator, mixed, noise_levels, noise_like
from kvpack.training.targets import targets
from kvpack.training.trainer import Learner


@dataclass(frozen=True, eq=False)
class ContextDistillation:
    """Mean squared difference of two velocities of a chunk, at every denoising step (ours; the paper trains by DMD).

    A clip is committed chunk by chunk, once with the stack and once with the same stack but nothing compressed. Then
    the next chunk, noised, is predicted behind both. Gradients pass through the attention of every layer into the
    tokens that stand for mid blocks, and from there into the compressor; the model's weights have none.

    Args:
        trainee: the frozen model.
        stack: the memory, whose compressor has the module.
        compressor: the module.
        scheduler: whose noise levels are used.
        steps: denoising steps.
    """

    trainee: Trainee
    stack: Stack
    compressor: nn.Module
    scheduler: Any
    steps: int = 4

    @property
    def learners(self) -> Sequence[Learner]:
        """The compressor."""
        return (Learner("compressor", self.compressor),)

    def backward(
        self, step: int, clips: Sequence[Clip], source: torch.Generator, backward: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """One chunk of clips of one length; gradients add up in the compressor.

        Args:
            step: of the training run; makes no difference.
            clips: clips of one shape.
            source: of the choice of the chunk and of its noise.
            backward: called with each loss.

        Returns:
            The loss, as means over the denoising steps.

        Raises:
            InvalidOptionError: if no chunk of such clips attends anything compressed.
        """
        found = targets(self.stack, clips[0].latents.shape[1])
        target = found[int(torch.randint(len(found), (), generator=source))]
        cuts: list[Cut] = []

        def learn(rollout: Rollout, loss: Tensor) -> float:
            cuts[:] = histories(rollout.session)
            backward(loss / self.steps)
            return float(loss.detach())

        losses = self._compare(clips, target, source, GraphBuffer, learn)
        backward_history(cuts)
        return {"loss": sum(losses) / len(losses)}

    @torch.no_grad()
    def measure(self, clips: Sequence[Clip], target: int, seed: int) -> list[float]:
        """Loss at each denoising step, without gradients."""
        return self._compare(clips, target, generator(seed, target), PackedBuffer, lambda _, loss: float(loss))

    def _compare(
        self,
        clips: Sequence[Clip],
        target: int,
        source: torch.Generator,
        buffer: type[PackedBuffer],
        learn: Callable[[Rollout, Tensor], float],
    ) -> list[float]:
        latents, embeds = torch.stack([clip.latents for clip in clips]), torch.stack([clip.embeds for clip in clips])
        chunks = latents.split(self.stack.chunk_frames, dim=2)[: target + 1]
        noise, levels = noise_like(chunks[target], source), noise_levels(self.scheduler, self.steps)
        policy = registry().policy
        whole = replace(self.stack, compressor=policy("compressor", "identity"), selector=policy("selector", "all"))
        size = latents.shape[3], latents.shape[4]
        with torch.no_grad():
            teacher = self.trainee.rollout(whole, embeds, size)
            with teacher.attached():
                for chunk in chunks[:-1]:
                    teacher.commit(chunk)
                wanted = [
                    teacher.predict(mixed(chunks[target], noise, sigma), timestep, step).float()
                    for step, (sigma, timestep) in enumerate(levels)
                ]
        student, losses = self.trainee.rollout(self.stack, embeds, size, buffer), []
        with student.attached():
            for chunk in chunks[:-1]:
                student.commit(chunk)
            for step, (sigma, timestep) in enumerate(levels):
                predicted = student.predict(mixed(chunks[target], noise, sigma), timestep, step).float()
                losses.append(learn(student, (predicted - wanted[step]).square().mean()))
        return losses
