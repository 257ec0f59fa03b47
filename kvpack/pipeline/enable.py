"""Swap a pipeline's memory for a stack of policies, and give it back."""

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from diffusers import DiffusionPipeline

from kvpack.checkpoints.causality import warn_if_bidirectional
from kvpack.checkpoints.config import Settings, frame_rate
from kvpack.generation.adapter import Adapter
from kvpack.memory.base import Memory
from kvpack.memory.ledger import require_length
from kvpack.pipeline.calls import Enabled
from kvpack.pipeline.enabled import PackForcingMixin, adapter_of, attach, enabled_class
from kvpack.planning.budget import Budget
from kvpack.plugins.resolve import named_stack, resolve_stack

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


#: What is set on an enabled pipeline and stays where another memory is enabled.
_KEPT = ("fps", "first_chunk_frames", "trace", "writer", "guidance_group")


def enable(
    pipeline: Pipeline,
    stack: str | Memory | Mapping[str, Any] | None = None,
    *,
    adapter: Adapter | None = None,
    budget_gb: float | None = None,
    **options: Any,
) -> Pipeline:
    """Let a causal video pipeline generate any length in bounded memory (PackForcing, arXiv 2603.25730).

    The pipeline keeps its class name, components and call; `num_frames` may now exceed what the model was trained with.
    Enabling again replaces the stack. Where the pipeline's folder has a `kvpack_config.json`, its frame rate, first
    chunk, chunk length and arguments of the call (steps, guidance) hold with any stack; what is given goes before them.

    Args:
        pipeline: a diffusers pipeline.
        stack: name of an installed stack, a `Stack` or other `Memory`, or what its `to_dict` gave; None is what the
            `kvpack_config.json` of the pipeline's folder says, and "packforcing" where there is none.
        adapter: what drives the pipeline; None is the one of before, or else the installed one for its class.
        budget_gb: most gigabytes that the memory of a generation may hold beside the model, all guidance branches and
            videos of the batch together. At the start of each call the options that were not given are chosen so that
            it fits, with the least loss first (`kvpack.planning.budget.STEPS`), or the call is refused with the least
            that would do; `pipe.packforcing.choice` says what was chosen and why.
        options: options of the named stack, e.g. `topk=16`; they go before those of the file, and those before what the
            adapter knows to be better for its model than the stack's own (`Adapter.default_options`).

    Returns:
        The same pipeline.

    Examples:
        >>> import kvpack, kvpack.testing
        >>> pipe = kvpack.enable(kvpack.testing.tiny_wan_pipeline(), topk=2)
        >>> pipe.packforcing.stack.selector.topk
        2

    Raises:
        UnsupportedPipelineError: if no adapter drives this pipeline, or something is switched on that cannot work.
        UnknownNameError: if a stack or policy is not installed.
        InvalidOptionError: if an option is unknown or wrong, or a compressor's weights are missing or another model's.
    """
    # Not by getattr, for which diffusers looks into the pipeline's config.
    before: Enabled | None = getattr(pipeline, "__dict__", {}).get("_kvpack")
    adapter = adapter or (adapter_of(pipeline) if before is None else before.adapter)
    adapter.check(pipeline)  # all that may be refused comes before the pipeline is touched
    configs = adapter.configs(pipeline)
    saved = Settings.of_pipeline(pipeline)
    settings = saved or Settings(fps=frame_rate(type(pipeline).__name__, configs))
    # Twice, for the budget makes the stack anew.
    asked = stack, options, settings, partial(adapter.default_options, configs)
    resolved = resolve_stack(*asked)
    budget = None if budget_gb is None else Budget(budget_gb, named_stack(*asked))
    own = {"fps": float(settings.fps), "first_chunk_frames": settings.first_chunk_frames}
    kept: dict[str, Any] = own if before is None else {name: getattr(before, name) for name in _KEPT}
    if kept["first_chunk_frames"] is not None:  # of before, maybe longer than the new stack's chunks
        require_length(kept["first_chunk_frames"], resolved.chunk_frames, "first_chunk_frames: a chunk")
    adapter.check_stack(pipeline, resolved)
    if not isinstance(pipeline, PackForcingMixin):
        if saved is None:  # kvpack's settings are in folders of causal models only
            warn_if_bidirectional(getattr(pipeline, "transformer", None))
        pipeline.__class__ = enabled_class(type(pipeline))  # type: ignore[assignment]
    attach(pipeline, resolved, adapter, call=settings.call, budget=budget, **kept)
    return pipeline


def disable(pipeline: Pipeline) -> Pipeline:
    """Make it the stock pipeline of before, bit for bit; it does nothing to one that is not enabled."""
    if isinstance(pipeline, PackForcingMixin):
        pipeline.__dict__.pop("_kvpack", None)
        pipeline.__class__ = pipeline._kvpack_base  # type: ignore[assignment]
    return pipeline
