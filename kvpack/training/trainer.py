"""The loop of a training run: the same weights whether or not it was stopped on its way."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from kvpack.errors import TrainingError, first_line
from kvpack.media.files import save_bytes, whole_file
from kvpack.training.clips import Clip, ClipFolder
from kvpack.training.log import append_log, cut_log
from kvpack.training.noise import generator
from kvpack.training.recipe import TrainingRecipe

STATE, LOG, RECIPE = "state.pt", "log.csv", "recipe.json"


@dataclass(frozen=True, eq=False)
class Learner:
    """Weights that one optimiser trains: those of a module that require gradients.

    Args:
        name: what checkpoints call it.
        module: the module.
        rate: its learning rate, as a multiple of the recipe's.
        options: of AdamW.
    """

    name: str
    module: nn.Module
    rate: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Its parameters by name."""
        return {name: each for name, each in self.module.named_parameters() if each.requires_grad}


class Objective(Protocol):
    """What a training run minimises."""

    @property
    def learners(self) -> Sequence[Learner]:
        """What is trained; a learner without gradients in a step is not updated."""
        ...

    def backward(
        self, step: int, clips: Sequence[Clip], source: torch.Generator, backward: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Add up gradients for one batch, by `backward(loss)`, and return what is logged."""
        ...


class Trainer:
    """A training run in a folder, new or resumed.

    The folder has `state.pt`, from which it goes on bit for bit on the same kind of processor, `log.csv`, and
    `recipe.json`, which says what it is a training of.

    Args:
        objective: what is minimised.
        clips: the data.
        recipe: how long and how fast.
        output: the folder.
        accelerator: processes, precision and trackers.
        about: what else must be the same for a run to go on.

    Raises:
        TrainingError: if the folder holds another training, a state that cannot be read, or not the same in
            all processes.
    """

    def __init__(
        self,
        objective: Objective,
        clips: ClipFolder,
        recipe: TrainingRecipe,
        output: Path,
        accelerator: Accelerator,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.objective, self.clips, self.recipe, self.output = objective, clips, recipe, output
        self.accelerator = accelerator
        self.step = self.saved_step = 0
        told = {**asdict(recipe), "clips": clips.fingerprint(), "processes": accelerator.num_processes, **(about or {})}
        # These two may change between a run and its continuation: they change no gradient, and no rate of the past.
        told = {name: value for name, value in told.items() if name not in ("steps", "save_every")}
        self.about = json.dumps(told, indent=2, sort_keys=True, default=str) + "\n"
        self.optimisers, self.rates = {}, {}
        for learner in objective.learners:
            optimiser = torch.optim.AdamW(learner.trained.values(), **learner.options)
            self.optimisers[learner.name] = accelerator.prepare_optimizer(optimiser)
            self.rates[learner.name] = recipe.rates(learner.rate)
        output.mkdir(parents=True, exist_ok=True)
        self._resume()

    def run(self, saved: Callable[[int], None] = lambda step: None) -> None:
        """Train to the end.

        Raises:
            TrainingError: if a loss or a gradient is not finite; the last checkpoint is as it was.
        """
        main = self.accelerator.is_main_process
        with tqdm(total=self.recipe.steps, initial=self.step, desc="train", disable=not main) as bar:
            while self.step < self.recipe.steps:
                told = self._advance()
                bar.update()
                bar.set_postfix({name: f"{value:.4g}" for name, value in told.items()})
                if main:
                    self.accelerator.log(told, step=self.step)
                    append_log(self.output / LOG, self.step, told)
                if self.step % self.recipe.save_every == 0 or self.step == self.recipe.steps:
                    self.accelerator.wait_for_everyone()
                    if main:
                        saved(self.step)  # first, so that a run killed here makes up for it
                        self._save()

    def _advance(self) -> dict[str, float]:
        """Do one optimiser step, and return what is logged."""
        recipe, accelerator = self.recipe, self.accelerator
        totals: dict[str, float] = {}
        for part in range(recipe.accumulation):
            # The number of a batch in the run, by which its clips and noise are drawn: none comes twice.
            turn = (self.step * recipe.accumulation + part) * accelerator.num_processes + accelerator.process_index
            told = self.objective.backward(
                self.step,
                self._batch(turn),
                generator(recipe.seed, 1, turn),
                lambda loss: accelerator.backward(loss / recipe.accumulation),
            )
            for name, value in told.items():
                totals[name] = totals.get(name, 0.0) + value / recipe.accumulation
        totals = {name: float(self._mean(torch.tensor(value))) for name, value in totals.items()}
        norms = self._update(totals)
        self.step += 1
        return {**totals, **norms}

    def _batch(self, turn: int) -> list[Clip]:
        """Return the clips of a batch; every epoch has its own order."""
        first, chosen = turn * self.recipe.batch, []
        for index in range(first, first + self.recipe.batch):
            round_, place = divmod(index, len(self.clips))
            # Of the epoch alone: a resumed run needs no state.
            order = torch.randperm(len(self.clips), generator=generator(self.recipe.seed, 0, round_))
            chosen.append(self.clips[int(order[place])])
        return chosen

    def _update(self, told: dict[str, float]) -> dict[str, float]:
        """Take a step with each learner that has gradients, and return their norms."""
        norms, scaler = {}, self.accelerator.scaler
        for learner in self.objective.learners:
            if reached := self._reached(list(learner.trained.values())):
                # Not those of the others, as accelerate's own clipping does.
                self.accelerator.unscale_gradients(self.optimisers[learner.name])
                norms[learner.name] = float(nn.utils.clip_grad_norm_(reached, self.recipe.clip_norm))
        named = {f"{name} gradient norm": norm for name, norm in norms.items()}
        # A gradient that overflows fp16 is no sign of divergence: its scaler passes over the step.
        seen = told if self.accelerator.mixed_precision == "fp16" else {**told, **named}
        bad = {name: value for name, value in seen.items() if not math.isfinite(value)}
        if bad:
            last = self.saved_step
            kept = f"the checkpoint of step {last} in {self.output} is kept" if last else "there is no checkpoint yet"
            raise TrainingError(
                f"training diverged at step {self.step + 1}: {', '.join(f'{k} is {v}' for k, v in bad.items())}; "
                f"{kept}. "
                f"Go on from it with a learning rate below {self.recipe.learning_rate:g}, or look at the clips"
            )
        for name in norms:
            optimiser = self.optimisers[name]
            for group in optimiser.param_groups:
                group["lr"] = self.rates[name](self.step)
            # Accelerate's own step would change the scale before the next learner's.
            optimiser.step() if scaler is None else scaler.step(optimiser.optimizer)
            optimiser.zero_grad()
        if scaler is not None and norms:
            scaler.update()
        return named

    def _reached(self, trained: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters that have a gradient in any process, each with the mean over all of them."""
        shares = self._mean(torch.tensor([float(each.grad is not None) for each in trained]))
        reached = [each for each, share in zip(trained, shares.tolist(), strict=True) if share > 0]
        for each in reached:
            # What a batch does not reach has a gradient of zero there, as in an accumulation of both batches.
            each.grad = self._mean(torch.zeros_like(each) if each.grad is None else each.grad)
        return reached

    def _mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor over all processes."""
        if self.accelerator.num_processes == 1:
            return tensor
        reduced: Any = self.accelerator.reduce(tensor.to(self.accelerator.device), reduction="mean")
        return reduced

    def _save(self) -> None:
        learners, scaler = {each.name: self._state(each) for each in self.objective.learners}, self.accelerator.scaler
        with whole_file(self.output / STATE, durable=True) as file:
            data = {"step": self.step, "learners": learners, "scaler": scaler and scaler.state_dict()}
            torch.save(data, cast(IO[bytes], file))  # it asks for `write` and `flush` alone
        self.saved_step = self.step

    def _state(self, learner: Learner) -> dict[str, Any]:
        return {
            "weights": {name: each.detach().cpu() for name, each in learner.trained.items()},
            "optimiser": self.optimisers[learner.name].state_dict(),
        }

    def _resume(self) -> None:
        recipe, state = self.output / RECIPE, self.output / STATE
        data: dict[str, Any] = self._read(recipe, state) if state.exists() else {"step": 0}
        every: Any = self.accelerator.gather(torch.tensor([data["step"]], device=self.accelerator.device))
        steps = every.tolist()
        if len(set(steps)) > 1:  # each would wait for the others at another step
            seen = ", ".join(f"process {rank} at step {step}" for rank, step in enumerate(steps))
            raise TrainingError(
                f"the processes do not see the same {state}: with theirs {seen}; give a folder that all nodes share"
            )
        if not data["step"]:
            if self.accelerator.is_main_process:
                save_bytes(self.about.encode(), recipe)
                (self.output / LOG).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
            return
        self.step = self.saved_step = data["step"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(data["scaler"])
        for learner in self.objective.learners:
            kept, trained = data["learners"][learner.name], learner.trained
            with torch.no_grad():
                for name, weights in kept["weights"].items():
                    trained[name].copy_(weights)  # in place: the optimiser holds these very tensors
            self.optimisers[learner.name].load_state_dict(kept["optimiser"])
        if self.accelerator.is_main_process:
            cut_log(self.output / LOG, self.step)

    def _read(self, recipe: Path, state: Path) -> dict[str, Any]:
        """Return the state in a folder, if it is one of this training."""
        if not recipe.exists() or recipe.read_text(encoding="utf-8", errors="replace") != self.about:
            raise TrainingError(
                f"{self.output} holds another training, see {recipe}; "
                "give it the same options to go on, or a new folder"
            )
        try:
            return dict(torch.load(state, map_location="cpu", weights_only=True))
        except Exception as error:  # of zip, pickle or the disk
            raise TrainingError(
                f"{state} cannot be read ({first_line(error)}); put a copy of it there, remove it to begin anew, or "
                f"train the weights beside it in another folder, from --initial {self.output}"
            ) from error
