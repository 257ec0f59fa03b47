"""Everything that training a compressor of a pipeline needs, put together."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from kvpack.checkpoints.hub import model_folder
from kvpack.compressors.network import Branches, HighResolutionBranch
from kvpack.compressors.weights import CompressorWeights
from kvpack.errors import InvalidOptionError, require_choice, require_int
from kvpack.logging import get_logger
from kvpack.media.files import whole_files
from kvpack.memory.roles import Project
from kvpack.memory.stack import Stack
from kvpack.pipeline.enabled import adapter_of
from kvpack.pipeline.track import load_pipeline
from kvpack.planning.presets import ModelDescription, adapter_for, from_folder
from kvpack.plugins.registry import registry
from kvpack.plugins.resolve import require_stack, resolve_stack
from kvpack.snapshots.fingerprint import model_digests
from kvpack.training.clips import Broken, ClipFolder
from kvpack.training.distillation import ContextDistillation
from kvpack.training.matching import DistributionMatching
from kvpack.training.noise import noise_levels
from kvpack.training.recipe import TrainingRecipe
from kvpack.training.targets import targets
from kvpack.training.trainer import Objective, Trainer

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class CompressorTraining:
    """A training run of a compressor for one frozen model.

    Args:
        model: folder or Hub id of a diffusers pipeline.
        data: folder of clips (see `ClipFolder`).
        output: folder of the run; the compressor is saved there, for `enable_packforcing(compressor=folder)`.
        stack: the memory that it is trained in; the model's own if None, as `enable_packforcing` has it.
        options: options of the stack, which go before the model's own.
        branches: which compressor.
        project: how its tokens become keys and values.
        hidden: channels between its convolutions.
        initial: folder or Hub id of a trained compressor to go on from; None starts from what it is before training.
        teacher: folder or Hub id of a pipeline with a bidirectional transformer: trains by distribution matching
            instead of by context distillation.
        lora_rank: rank of LoRA weights of the model, trained too; needs a teacher.
        critic_steps: steps of the critic for one of the compressor; needs a teacher.
        guidance_scale: of the teacher.
        frames: latent frames of a clip.
        size: height and width in pixels that videos are scaled and cropped to, and that latents must have.
        fps: frames a second that the model was trained with; its settings' or its family's if None.
        denoising_steps: of a chunk.
        chunks: chunks of a clip that are learned from at once, by context distillation.
        broken: what a broken clip does.
        max_sequence_length: text tokens; the pipeline's own default if None.
        mixed_precision: "no", "bf16" or "fp16"; the frozen model's dtype. What is trained stays in float32.
        cpu: whether to leave an accelerator alone.
        tensorboard: whether to log for TensorBoard beside `log.csv`.
        base_model: what the saved config calls the model; the folder's name if None.
        recipe: how long and how fast.

    Raises:
        InvalidOptionError: if an option cannot work.
    """

    model: Path
    data: Path
    output: Path
    stack: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    branches: Branches = "dual"
    project: Project = "layers"
    hidden: int = 64
    initial: str | None = None
    teacher: Path | None = None
    lora_rank: int = 0
    critic_steps: int = 5
    guidance_scale: float = 3.0
    frames: int = 20
    size: tuple[int, int] | None = None
    fps: float | None = None
    denoising_steps: int = 4
    chunks: int = 1
    broken: Broken = "stop"
    max_sequence_length: int | None = None
    mixed_precision: str = "no"
    cpu: bool = False
    tensorboard: bool = False
    base_model: str | None = None
    recipe: TrainingRecipe = field(default_factory=TrainingRecipe)

    def __post_init__(self) -> None:
        require_choice("mixed_precision", self.mixed_precision, PRECISIONS)
        require_choice("broken", self.broken, ("stop", "skip"))
        for name in ("critic_steps", "frames", "denoising_steps", "chunks"):
            require_int(name, getattr(self, name), minimum=1)
        require_int("lora_rank", self.lora_rank)
        if self.max_sequence_length is not None:
            require_int("max_sequence_length", self.max_sequence_length, minimum=1)
        if not isfinite(self.guidance_scale):
            raise InvalidOptionError(f"guidance_scale must be a number, got {self.guidance_scale}")
        if self.fps is not None and not 0 < self.fps < inf:
            raise InvalidOptionError(f"fps must be a number > 0, got {self.fps}")
        if self.lora_rank and self.teacher is None:
            raise InvalidOptionError(
                "lora_rank needs a teacher: context distillation asks that the model stays what it is; give a teacher"
            )
        if "compressor" in self.options:
            raise InvalidOptionError(
                "the stack's compressor is what is trained; choose it by branches, not by an option"
            )

    def run(self) -> HighResolutionBranch:
        """Train to the end, resuming from the last checkpoint if there is one.

        Raises:
            BrokenClipError: if a clip cannot be used.
            TrainingError: if training diverges, or the folder holds another one.
            UnsupportedPipelineError: if no adapter can train this pipeline.
        """
        # What cannot work is found out now, before models are loaded and clips encoded.
        described = from_folder(self.model)
        stack = self._stack(described)
        targets(stack, self.frames)  # raises where no chunk would learn anything
        if self.size is not None:
            adapter_for(described).geometry(described.configs, *self.size, PRECISIONS[self.mixed_precision])
        accelerator = Accelerator(
            mixed_precision=self.mixed_precision,
            cpu=self.cpu,
            log_with="tensorboard" if self.tensorboard else None,
            project_dir=str(self.output),
        )
        pipeline = frozen(self.model, PRECISIONS[self.mixed_precision], str(accelerator.device))
        trainee = adapter_of(pipeline).trainee(pipeline, self.max_sequence_length)
        noise_levels(pipeline.scheduler, self.denoising_steps)
        config = pipeline.transformer.config
        models = model_digests(pipeline)
        branch = self._branch(config, stack).to(accelerator.device)
        about = {name: str(getattr(self, name)) for name in _ABOUT} | {"stack": stack.to_dict(), "models": models}
        trained = {"weights": branch, "project": branch.project, "coordinates": branch.coordinates}
        # With this very branch, which is trained while it is used.
        stack = replace(stack, compressor=registry().policy("compressor", self.branches, trained))
        clips = ClipFolder(
            self.data,
            trainee,
            self.frames,
            config.in_channels,
            size=self.size,
            fps=described.settings.fps if self.fps is None else self.fps,
            cache=self.output / "clips",
            encoder=models.get("vae", ""),
            broken=self.broken,
            device=accelerator.device,
        )
        if clips.skipped and accelerator.is_main_process:
            lines = "\n".join([f"{len(clips)} clips are taken, left out are {len(clips.skipped)}:", *clips.skipped])
            get_logger().warning(lines)
        negative = trainee.embed([""])[0]
        if (text_encoder := getattr(pipeline, "text_encoder", None)) is not None:
            text_encoder.to("cpu")  # its work is done, and it may be larger than the model
        objective: Objective
        if self.teacher is None:
            objective = ContextDistillation(
                trainee, stack, branch, pipeline.scheduler, self.denoising_steps, self.chunks
            )
        else:
            objective = DistributionMatching(
                trainee,
                stack,
                pipeline.scheduler,
                self._generator(branch, pipeline.transformer),
                frozen(self.teacher, PRECISIONS[self.mixed_precision], str(accelerator.device)).transformer,
                negative,
                whole_model=self.lora_rank > 0,
                steps=self.denoising_steps,
                critic_steps=self.critic_steps,
                guidance_scale=self.guidance_scale,
                autocast=lambda: accelerator.autocast(),
            )
        trainer = Trainer(objective, clips, self.recipe, self.output, accelerator, about)
        if self.tensorboard:
            accelerator.init_trackers("tensorboard")
        trainer.run(lambda step: self._save(branch, pipeline))
        with suppress(AttributeError):  # nothing to end without trackers
            accelerator.end_training()
        return branch

    def _branch(self, config: Any, stack: Stack) -> HighResolutionBranch:
        """Build the network that is trained, with its initial weights."""
        branch = HighResolutionBranch(
            channels=config.in_channels,
            width=config.num_attention_heads * config.attention_head_dim,
            patch=tuple(config.patch_size[1:]),
            hidden=self.hidden,
            branches=self.branches,
            project=self.project,
            coordinates=getattr(stack.compressor, "coordinates", "centered"),
            chunk_frames=stack.chunk_frames,
            base_model=self.base_model or self.model.resolve().name,
            seed=self.recipe.seed,
        )
        if self.initial is not None:
            source = CompressorWeights(self.initial).fitting(branch.channels, branch.width, branch.patch)
            for name in ("hidden", "branches", "project", "coordinates"):
                has, asked = getattr(source, name), getattr(branch, name)
                if has != asked:
                    raise InvalidOptionError(
                        f"initial {self.initial} has {name}={has}, but {name}={asked} was asked for; give {name}={has}"
                    )
            branch.load_state_dict(source.state_dict())
        return branch

    def _stack(self, described: ModelDescription) -> Stack:
        """Return the memory as it is enabled on this model, its compressor not yet with weights."""
        # Asked for as a user does, so that options which a trained compressor does not take are refused.
        name = self.stack or described.settings.stack
        compressor = registry().taken(name, {"compressor": self.branches})
        if name in registry().stacks and not compressor:
            raise InvalidOptionError(f"stack {name} takes no compressor; give one that does, e.g. packforcing")
        defaults = partial(adapter_for(described).default_options, described.configs)
        stack = require_stack(resolve_stack(self.stack, {**compressor, **self.options}, described.settings, defaults))
        if stack.commit != "rerun":
            raise InvalidOptionError(
                f"training commits clean chunks, but {stack.name} has commit={stack.commit}; give commit=rerun"
            )
        return stack

    def _generator(self, branch: HighResolutionBranch, transformer: Any) -> nn.Module:
        """Return the trained modules: the compressor, and the model if it has LoRA weights."""
        if not self.lora_rank:
            return nn.ModuleList([branch])
        from peft import LoraConfig

        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        with torch.random.fork_rng():  # add_adapter draws from torch's own generator
            torch.manual_seed(self.recipe.seed)
            transformer.add_adapter(LoraConfig(r=self.lora_rank, lora_alpha=self.lora_rank, target_modules=targets))
        for each in transformer.parameters():
            if each.requires_grad:  # the LoRA's alone: the model is frozen
                each.data = each.data.float()  # a step may be less than half precision's last bit
        return nn.ModuleList([branch, transformer])

    def _save(self, branch: HighResolutionBranch, pipeline: Any) -> None:
        with whole_files(self.output) as folder:
            branch.save_pretrained(folder)
            if (self.output / "README.md").exists():  # somebody may have written into it
                (folder / "README.md").unlink()
            if self.lora_rank:
                from peft import get_peft_model_state_dict

                pipeline.save_lora_weights(folder, get_peft_model_state_dict(pipeline.transformer))


_ABOUT = (
    "branches",
    "project",
    "hidden",
    "initial",
    "teacher",
    "lora_rank",
    "critic_steps",
    "guidance_scale",
    "denoising_steps",
    "chunks",
    "mixed_precision",
    "max_sequence_length",
)


def frozen(folder: Path | str, dtype: torch.dtype, device: str) -> Any:
    """Load a pipeline from a folder or by its Hub id, without gradients and without dropout.

    Raises:
        InvalidOptionError: if there is none.
    """
    pipeline = load_pipeline(model_folder(folder), dtype, device)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipeline
