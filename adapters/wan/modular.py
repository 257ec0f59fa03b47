"""The denoising block of a modular Wan pipeline over kvpack's memory: put it in the place of the stock one.

```python
from diffusers.modular_pipelines.wan import WanBlocks
from kvpack.adapters.wan.modular import KVPackDenoiseStep

blocks = WanBlocks()
blocks.sub_blocks["denoise"].sub_blocks["denoise"] = KVPackDenoiseStep("packforcing", topk=16)
pipe = blocks.init_pipeline(repository)
```
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from diffusers.modular_pipelines.wan.denoise import WanDenoiseStep
from torch import Tensor

from kvpack.adapters.wan.adapter import WanAdapter
from kvpack.adapters.wan.denoiser import WanDenoiser
from kvpack.adapters.wan.vae import StreamingDecoder
from kvpack.errors import UnsupportedPipelineError
from kvpack.generation.chunks import require_generators, rewinding
from kvpack.generation.phase import Phase
from kvpack.memory.base import Memory
from kvpack.plugins.resolve import resolve_stack

# As diffusers' guiders name their predictions.
_FIELDS = {"pred_cond": "prompt_embeds", "pred_uncond": "negative_prompt_embeds"}


class KVPackDenoiseStep(WanDenoiseStep):
    """Denoise the latents chunk by chunk, each with kvpack's memory of those before it (arXiv 2603.25730).

    Its inputs are those of `WanDenoiseStep` and the call's `generator`, of which a scheduler that takes one
    (`FlowMatchFewStepScheduler`) draws its noise. Its parts are those of `WanDenoiseStep`, and may be replaced. One
    more output, `memory_stats`, is what `pipe.packforcing.stats()` gives of a `WanPipeline`. If the frames are no
    multiple of the stack's chunk, the last chunk is shorter.

    Args:
        stack: name of an installed stack, a `Stack` or other `Memory`, or what its `to_dict` gave.
        options: options of the named stack, e.g. `topk=16`.

    Raises:
        UnknownNameError: if a stack or policy is not installed.
        InvalidOptionError: if an option is unknown or wrong.
    """

    def __init__(self, stack: str | Memory | Mapping[str, Any] = "packforcing", **options: Any) -> None:
        super().__init__()
        self.stack = resolve_stack(stack, options)

    @property
    def description(self) -> str:
        """What diffusers prints of the block."""
        return f"Denoises chunk by chunk, with kvpack's memory {self.stack.name} of the chunks before."

    @property
    def loop_inputs(self) -> list[InputParam]:
        """What the block takes beside its parts' inputs."""
        return [*super().loop_inputs, InputParam("generator", description="Draws noise between the steps")]

    @property
    def loop_intermediate_outputs(self) -> list[OutputParam]:
        """What the block leaves beside its parts' outputs."""
        return [OutputParam("memory_stats", type_hint=dict, description="Tokens and bytes of the memory, and seconds")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Denoise and remember chunk after chunk; the transformer is the stock one before and after."""
        block: Any = self.get_block_state(state)
        require_generators(block.generator)
        adapter = WanAdapter()
        adapter.check(components)
        adapter.check_stack(components, self.stack)
        run = _ModularRun(self, adapter, components, block)
        sizes, chunks = block.latents.split(self.stack.chunk_frames, dim=2), []
        progress: Any = self.progress_bar
        with progress(total=len(sizes) * len(block.timesteps)) as bar:
            for index, part in enumerate(sizes):
                chunks.append(run.chunk(index, part, last=index == len(sizes) - 1, advance=bar.update))
        block.latents = torch.cat(chunks, dim=2)
        block.memory_stats = run.denoiser.stats()
        self.set_block_state(state, block)
        return components, state


class _ModularRun:
    """One generation of a modular pipeline."""

    def __init__(self, step: KVPackDenoiseStep, adapter: WanAdapter, components: Any, block: Any) -> None:
        self.step, self.adapter, self.components, self.block = step, adapter, components, block
        height, width = (side * components.vae_scale_factor_spatial for side in block.latents.shape[3:])
        config = {"scale_factor_spatial": components.vae_scale_factor_spatial}
        configs = {"transformer": components.transformer.config, "vae": config}
        geometry = adapter.geometry(configs, height, width, components.transformer.dtype)
        geometry = replace(geometry, frames=block.latents.shape[2])  # so that an archive has its room at once
        #: Names of the guider's predictions at each step, in the order in which it asks for them.
        self.branches = [self._branches(i, t) for i, t in enumerate(block.timesteps)]
        names = {name for step_names in self.branches for name in step_names}
        embeds = {
            name: getattr(block, field).to(components.transformer.dtype)
            for name, field in _FIELDS.items()
            if name in names
        }
        # Keeps no prompt: parts of the loop may be anybody's.
        self.denoiser = WanDenoiser(components, step.stack, geometry, embeds, block.attention_kwargs)
        self.decoder = StreamingDecoder(components.vae, height, width) if step.stack.needs_pixels else None
        # As set_timesteps left it: each chunk begins with its first step.
        self._schedule = deepcopy(vars(components.scheduler))

    def chunk(self, index: int, noise: Tensor, *, last: bool, advance: Any) -> Tensor:
        """Return the clean latents of a chunk, which are in the memory unless it is the last."""
        denoiser = self.denoiser
        denoiser.expect(noise.shape[2])
        rewind = rewinding(self.block.generator)

        def again() -> Tensor:
            rewind()
            return self._denoised(index, noise, advance)

        with denoiser.seam():
            latents = denoiser.accepted(self._denoised(index, noise, advance), again)
            # Nothing attends the last chunk, so that its commit would be in vain.
            if not last:
                denoiser.commit(latents, None if self.decoder is None else self.decoder(latents))
        return latents

    def _denoised(self, index: int, noise: Tensor, advance: Any) -> Tensor:
        """Run the upstream steps of a chunk, which begin the scheduler's schedule anew."""
        block, scheduler = self.block, self.components.scheduler
        block.latents = noise
        vars(scheduler).update(deepcopy(self._schedule))  # a copy: multistep schedulers change lists in it
        drawing = getattr(scheduler, "bound_generator", nullcontext)(block.generator)
        with self.denoiser.timed("denoise"), self.denoiser.during(Phase()), self._branch_contexts() as coming, drawing:
            for i, t in enumerate(block.timesteps):
                coming[:] = [(name, i) for name in self.branches[i]]  # in place: the hook below holds this very list
                self.step.loop_step(self.components, block, i=i, t=t)
                advance()
        self.denoiser.check_finite(block.latents, index)
        return block.latents

    def _branches(self, i: int, t: Tensor) -> list[str]:
        """Return the names of the predictions that the guider asks for at a step."""
        guider, steps = self.components.guider, self.block.num_inference_steps
        # A guider may leave a prediction out of some steps, and says so only once it is told the step.
        guider.set_state(step=i, num_inference_steps=steps, timestep=t)
        batches = guider.prepare_inputs_from_block_state(self.block, {"encoder_hidden_states": tuple(_FIELDS.values())})
        names = [getattr(batch, guider._identifier_key) for batch in batches]
        # A third prediction, as that of PAG, would need a memory of its own.
        if not set(names) <= set(_FIELDS):
            raise UnsupportedPipelineError(
                f"{type(guider).__name__} asks for {', '.join(names)}, but kvpack has a memory for each of "
                f"{', '.join(_FIELDS)} only; use ClassifierFreeGuidance"
            )
        return names

    @contextmanager
    def _branch_contexts(self) -> Iterator[list[tuple[str, int]]]:
        """Run every forward in the cache context of its prediction, which modular blocks do not say.

        Yields the branch and step of the forwards to come, which the caller fills.
        """
        transformer, coming = self.components.transformer, list[tuple[str, int]]()
        with ExitStack() as context:

            def enter(*_: Any) -> None:
                context.close()  # that of the forward before
                name, step = coming.pop(0)
                context.enter_context(transformer.cache_context(name, step_index=step))

            # In front of the hook that the seam has put there, which asks for the context.
            with transformer.register_forward_pre_hook(enter, prepend=True):
                yield coming
