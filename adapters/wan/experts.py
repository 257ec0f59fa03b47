"""Two experts that share a chunk's denoising steps (Wan 2.2 A14B): a memory each, in which both see all of the past."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kvpack.adapters.offload import offload
from kvpack.adapters.parallel import shard_of
from kvpack.adapters.wan.attention import attached
from kvpack.adapters.wan.denoiser import WanDenoiser
from kvpack.adapters.wan.prompt_cache import PromptCache, PromptedLayers
from kvpack.checkpoints.experts import require_one_transformer
from kvpack.errors import UnsupportedPipelineError
from kvpack.memory.base import Memory
from kvpack.memory.layer import AttendingLayer

#: Behind a guidance branch's name in that of the second expert's session.
_SECOND = " transformer_2"
_ALIKE = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "in_channels")


def experts_of(pipeline: Any) -> list[Any]:
    """Return the transformers of a pipeline: one, or two that share the steps.

    Raises:
        UnsupportedPipelineError: if there are others, or two that do not go together.
    """
    # `boundary_ratio` is in the config alone.
    parts: Mapping[str, Any] = {**pipeline.config, **pipeline.components}
    both: list[Any] = [parts.get(name) for name in ("transformer", "transformer_2")]
    if parts.get("boundary_ratio") is None or None in both:  # without a boundary the pipeline runs the first alone
        require_one_transformer("this pipeline", parts)
        return both[:1]
    first, second = (each.config for each in both)
    for name in _ALIKE:
        if first[name] != second[name]:
            raise UnsupportedPipelineError(
                f"the two experts must be of one shape, but {name} is {first[name]} in transformer and {second[name]} "
                "in transformer_2"
            )
    return both


class ExpertsDenoiser(WanDenoiser):
    """Two transformers over two sessions for each guidance branch; arguments are those of `WanDenoiser`.

    A clean chunk is forwarded at t = 0 by both, each into its own memory, as in FastVideo's code for the causal Wan 2.2
    (`CausalDMDDenosingStage`), so that what either sees was made with its own weights. Blocks are chosen by each at its
    own first step of a chunk.

    Raises:
        UnsupportedPipelineError: if the stack keeps what one expert alone has made, or only one of them is split.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.writer not in (None, self.transformer):
            raise UnsupportedPipelineError("a writer cannot commit for two experts; set packforcing.writer to None")
        self.second = self.pipeline.transformer_2
        self.second_prompt = None if self.prompt is None else PromptCache()  # the same text, but projections of its own
        _require_both(self.stack)
        if self.buffer.differentiable:
            raise UnsupportedPipelineError("two experts cannot be trained through; load the pipeline with one of them")
        if self.shard != shard_of(self.second):
            raise UnsupportedPipelineError("call enable_parallelism() on both experts, or on neither")

    @property
    def branches(self) -> tuple[str, ...]:
        """Guidance branches of the first expert, and of the second."""
        return (*self.conditioning, *(f"{name}{_SECOND}" for name in self.conditioning))

    @contextmanager
    def seam(self) -> Iterator[None]:
        """Put kvpack's processors into both transformers for the block."""
        prompted = PromptedLayers(self.second, self.second_prompt, self.cross_processor)
        with super().seam(), attached(self.second, self._second_layers, prompted, self.shard):
            yield

    def forget_prompt(self) -> None:
        """Compute the prompt's keys and values anew in both."""
        super().forget_prompt()
        if self.second_prompt is not None:
            self.second_prompt.forget()

    def layers_for(self, branch: str, step: int | None = None) -> Sequence[AttendingLayer]:
        """Return each layer's memory; where models are offloaded, the second expert makes room for the first."""
        if not branch.endswith(_SECOND):
            # Accelerate's chain of hooks takes the first out for the second, but not the other way in the next chunk.
            offload(self.second)
        return super().layers_for(branch, step)

    def model_of(self, branch: str) -> tuple[Any, str]:
        """Return the expert whose session has this name, and its guidance branch."""
        name = branch.removesuffix(_SECOND)
        return (self.transformer if name == branch else self.second), name

    def _second_layers(self, branch: str, step: int | None) -> Sequence[AttendingLayer]:
        if step is None and self.phase is not None:
            step = self.phase.counted(branch)  # the steps of both are those of one chunk
        return self.layers_for(f"{branch}{_SECOND}", step)


def _require_both(stack: Memory) -> None:
    if stack.commit != "rerun":
        raise UnsupportedPipelineError(
            f'{stack.name} keeps the last denoising step (commit="last-step"), which one of two experts has made; '
            'take commit="rerun"'
        )
    if stack.latent_compressor is not None:
        raise UnsupportedPipelineError(
            f"compressor {stack.latent_compressor.name} makes tokens for one transformer, but this pipeline has two "
            'experts; take one that works on keys and values, as "keep-farthest" or "pool"'
        )
