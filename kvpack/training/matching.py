"""Distribution matching distillation (arXiv 2405.14867) of a rollout over packed memory, as PackForcing trains."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvpack.generation.trainee import Trainee
from kvpack.memory.stack import Stack
from kvpack.training.buffer import Cut, GraphLayer, backward_history, histories, straight_through
from kvpack.training.clips import Clip
from kvpack.training.noise import mixed, noise_levels, noise_like
from kvpack.training.targets import targets
from kvpack.training.trainer import Learner

SIGMAS = (0.02, 0.98)  # between which noise is added to what was generated, before the shift


@dataclass(eq=False)
class DistributionMatching:
    """Distribution matching: videos made over packed memory should be likely under a teacher that sees whole clips.

    As in sections 3.2 and 4 of PackForcing (arXiv 2603.25730), every step generates videos from noise, chunk by chunk,
    and trains a critic, which begins as the teacher, to denoise them. Every `critic_steps` steps one chunk of them,
    with the last of its denoising steps in the graph, moves to where the teacher finds it likelier than the critic
    does. A graph so spans one chunk and the twins that it attends; the paper's spans all chunks of a rollout, which is
    the same gradient in expectation.

    Of a clip the caption and the size are used only.

    Args:
        trainee: the model; its own weights are trained where they require gradients, as LoRA weights do.
        stack: the memory.
        scheduler: whose noise levels are used.
        generator: what is trained: the compressor, and a model with LoRA weights if there are.
        teacher: a bidirectional transformer of the same family, frozen.
        whole_model: whether the model has trained weights too, which every chunk teaches; a compressor learns from
            chunks that attend something compressed only.
        negative: embeddings of the caption that guidance leads away from, `[tokens, width]`.
        steps: denoising steps.
        critic_steps: steps of the critic for one of the generator.
        critic_rate: learning rate of the critic, as a multiple of the recipe's.
        guidance_scale: of the teacher.
        shift: of the noise added to what was generated.
        autocast: precision of the critic's forward.
    """

    trainee: Trainee
    stack: Stack
    scheduler: Any
    generator: nn.Module
    teacher: Any
    negative: Tensor
    whole_model: bool = False
    steps: int = 4
    critic_steps: int = 5
    critic_rate: float = 0.5
    guidance_scale: float = 3.0
    shift: float = 5.0
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    critic: Any = field(init=False)

    def __post_init__(self) -> None:
        self.teacher.requires_grad_(False)
        # In float32, in whatever precision its forward is: the optimiser's steps are small.
        self.critic = deepcopy(self.teacher).float().requires_grad_(True)

    @property
    def learners(self) -> Sequence[Learner]:
        """The generator, which has gradients every `critic_steps` steps, and the critic."""
        # Self-Forcing's, without momentum.
        options = {"betas": (0.0, 0.999), "weight_decay": 0.01}
        return (
            Learner("generator", self.generator, options=options),
            Learner("critic", self.critic, self.critic_rate, options),
        )

    def backward(
        self, step: int, clips: Sequence[Clip], source: torch.Generator, backward: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Add up gradients of the critic in every step, and of the generator every `critic_steps` steps."""
        like, embeds = torch.stack([clip.latents for clip in clips]), torch.stack([clip.embeds for clip in clips])
        frames = like.shape[2] // self.stack.chunk_frames * self.stack.chunk_frames
        like, told = like[:, :, :frames], {}
        if step % self.critic_steps == 0:
            told["generator loss"] = self._move(like, embeds, source, backward)
        with torch.no_grad():
            videos, _ = self._generate(like, embeds, source, None)
        told["critic loss"] = self._denoise(videos, embeds, source, backward)
        return told

    def _move(self, like: Tensor, embeds: Tensor, source: torch.Generator, backward: Callable[[Tensor], None]) -> float:
        """Add up gradients of the generator through one chunk, and return its loss."""
        every = list(range(like.shape[2] // self.stack.chunk_frames))
        chunks = every if self.whole_model else targets(self.stack, like.shape[2])
        chunk = chunks[int(torch.randint(len(chunks), (), generator=source))]
        videos, cuts = self._generate(like, embeds, source, chunk)
        direction = self._direction(videos.detach(), embeds, source)
        # Its gradient in `videos` is `direction`, divided by the number of elements.
        loss = 0.5 * (videos - (videos.detach() - direction)).square().mean()
        backward(loss)
        backward_history(cuts)
        return float(loss.detach())

    def _generate(
        self, like: Tensor, embeds: Tensor, source: torch.Generator, learning: int | None
    ) -> tuple[Tensor, list[Cut]]:
        """Generate clean videos with the last step of chunk `learning` in the graph; return them and its history."""
        chunks, levels = like.split(self.stack.chunk_frames, dim=2), noise_levels(self.scheduler, self.steps)
        size = like.shape[3], like.shape[4]
        rollout = self.trainee.rollout(straight_through(self.stack), embeds, size, GraphLayer)
        last = int(torch.randint(len(levels), (), generator=source))  # one noise level for all chunks, as in the paper
        made: list[Tensor] = []
        cuts: list[Cut] = []
        with rollout.attached():
            for index, chunk in enumerate(chunks):
                noisy = noise_like(chunk, source)
                for step, (sigma, timestep) in enumerate(levels[: last + 1]):
                    # At every step, for history is filled in at the first; but only the last one's graph is kept.
                    with torch.set_grad_enabled(index == learning):
                        clean = noisy - sigma * rollout.predict(noisy, timestep, step).float()
                    if step < last:
                        noisy = mixed(clean.detach(), noise_like(chunk, source), levels[step + 1][0])
                made.append(clean)
                if index == learning:
                    cuts = histories(rollout.session)
                # Tokens of earlier chunks' commits are what the learning chunk attends; later ones nobody learns from.
                with torch.set_grad_enabled(learning is not None and index < learning):
                    rollout.commit(clean.detach())
        return torch.cat(made, dim=2), cuts

    @torch.no_grad()
    def _direction(self, videos: Tensor, embeds: Tensor, source: torch.Generator) -> Tensor:
        """Return the difference of critic and teacher, divided by the teacher's own mean error."""
        noisy, sigma, _ = self._noised(videos, source)
        against = self.negative.to(embeds).expand_as(embeds)
        toward = self._clean(self.teacher, noisy, sigma, embeds)
        away = self._clean(self.teacher, noisy, sigma, against)
        # Classifier-free guidance, away + scale * (toward - away), of clean predictions.
        real = toward + (self.guidance_scale - 1) * (toward - away)
        with self.autocast():
            fake = self._clean(self.critic, noisy, sigma, embeds)
        scale = (videos - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)  # of each video: DMD's L1 weight
        return (fake - real) / scale.clamp(min=1e-6)

    def _denoise(
        self, videos: Tensor, embeds: Tensor, source: torch.Generator, backward: Callable[[Tensor], None]
    ) -> float:
        """Add up gradients of the critic, and return its loss."""
        noisy, sigma, noise = self._noised(videos, source)
        with self.autocast():
            # sigma is [videos, 1, 1, 1, 1], times are [videos]
            velocity = self.trainee.velocity(self.critic, noisy, 1000 * sigma.flatten(), embeds).float()
        loss = (velocity - (noise - videos)).square().mean()  # flow matching
        backward(loss)
        return float(loss.detach())

    def _noised(self, videos: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        low, high = SIGMAS
        uniform = low + (high - low) * torch.rand(len(videos), 1, 1, 1, 1, generator=source).to(videos)
        # The flow's time shift.
        sigma, noise = self.shift * uniform / (1 + (self.shift - 1) * uniform), noise_like(videos, source)
        return mixed(videos, noise, sigma), sigma, noise

    def _clean(self, transformer: Any, noisy: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
        times = 1000 * sigma.flatten()  # [videos], of [videos, 1, 1, 1, 1]
        return noisy - sigma * self.trainee.velocity(transformer, noisy, times, embeds).float()
