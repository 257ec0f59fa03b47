"""Context distillation: what a model predicts behind packed history should be what it predicts behind all of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvpack.generation.trainee import Rollout, Trainee
from kvpack.memory.codec import DENSE
from kvpack.memory.layer import LayerCache
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
from kvpack.plugins.registry import registry
from kvpack.training.buffer import Cut, GraphLayer, backward_history, histories, straight_through
from kvpack.training.clips import Clip
from kvpack.training.noise import generator, mixed, noise_levels, noise_like
from kvpack.training.targets import targets
from kvpack.training.trainer import Learner


@dataclass(frozen=True, eq=False)
class ContextDistillation:
    """Mean squared difference of two velocities of a chunk, at every denoising step (ours; the paper trains by DMD).

    A clip is committed chunk by chunk, once with the stack and once with the same stack but nothing compressed. On the
    way some chunks, noised, are predicted behind both. Gradients pass through the attention of every layer into the
    tokens that stand for mid blocks, and from there into the compressor; the model's weights have none.

    Args:
        trainee: the frozen model.
        stack: the memory, whose compressor has the module.
        compressor: the module.
        scheduler: whose noise levels are used.
        steps: denoising steps.
        chunks: chunks of a clip that are predicted, of those that attend anything compressed.
    """

    trainee: Trainee
    stack: Stack
    compressor: nn.Module
    scheduler: Any
    steps: int = 4
    chunks: int = 1

    @property
    def learners(self) -> Sequence[Learner]:
        """The compressor."""
        return (Learner("compressor", self.compressor),)

    def backward(
        self, step: int, clips: Sequence[Clip], source: torch.Generator, backward: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Add up gradients in the compressor for chunks of clips of one shape, which `source` draws with their noise.

        Returns:
            The loss, as means over chunks and denoising steps.

        Raises:
            InvalidOptionError: if no chunk of such clips attends anything compressed.
        """
        found = targets(self.stack, clips[0].latents.shape[1])
        drawn = torch.randperm(len(found), generator=source)[: self.chunks].tolist()
        chosen = sorted(found[index] for index in drawn)
        losses = []
        for chunk, session, compared in self._compare(clips, chosen, source, GraphLayer):
            cuts: list[Cut] = []
            for loss in compared:
                cuts = histories(session)  # there once something was predicted, and one for all steps
                # Ends at the history, which is cut off: its gradients add up over the steps.
                backward(loss / (self.steps * len(chosen)))
                losses.append(float(loss.detach()))
            backward_history(cuts, again=chunk < chosen[-1])
        return {"loss": sum(losses) / len(losses)}

    @torch.no_grad()
    def measure(self, clips: Sequence[Clip], chosen: Sequence[int], seed: int) -> dict[int, list[float]]:
        """Return the losses of chunks, chosen in ascending order, of clips of one shape at each denoising step."""
        compared = self._compare(clips, chosen, generator(seed), LayerCache)
        return {chunk: [float(loss) for loss in losses] for chunk, _, losses in compared}

    def _compare(
        self, clips: Sequence[Clip], chosen: Sequence[int], source: torch.Generator, buffer: type[LayerCache]
    ) -> Iterator[tuple[int, Session, Iterator[Tensor]]]:
        """Yield each chosen chunk, the session that predicts it, and the losses of its denoising steps."""
        latents, embeds = torch.stack([clip.latents for clip in clips]), torch.stack([clip.embeds for clip in clips])
        chunks = latents.split(self.stack.chunk_frames, dim=2)[: chosen[-1] + 1]
        noises, levels = {c: noise_like(chunks[c], source) for c in chosen}, noise_levels(self.scheduler, self.steps)
        # The teacher is the same stack, except that nothing is compressed or forgotten and everything is attended.
        policy = registry().policy
        whole = replace(
            self.stack,
            compressor=policy("compressor", "identity"),
            selector=policy("selector", "all"),
            archive_blocks=None,
            store=DENSE,
        )

        def predictions(rollout: Rollout, chunk: int) -> Iterator[Tensor]:
            for step, (sigma, timestep) in enumerate(levels):
                yield rollout.predict(mixed(chunks[chunk], noises[chunk], sigma), timestep, step).float()

        def rolled(stack: Stack, kind: type[LayerCache]) -> Iterator[tuple[int, Rollout]]:
            rollout = self.trainee.rollout(stack, embeds, (latents.shape[3], latents.shape[4]), kind)
            for chunk, clean in enumerate(chunks):
                with rollout.attached():
                    if chunk in noises:
                        yield chunk, rollout
                    if chunk < chosen[-1]:  # nothing attends the last one
                        rollout.commit(clean)

        with torch.no_grad():
            wanted = {chunk: list(predictions(each, chunk)) for chunk, each in rolled(whole, LayerCache)}
        for chunk, student in rolled(straight_through(self.stack), buffer):
            pairs = zip(predictions(student, chunk), wanted[chunk], strict=True)
            yield chunk, student.session, ((mine - theirs).square().mean() for mine, theirs in pairs)
