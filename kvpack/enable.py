"""Swap a pipeline's memory for a stack of policies, and give it back."""

from collections.abc import Mapping
from typing import Any, TypeVar

from diffusers import DiffusionPipeline

from kvpack.adapter import Adapter
from kvpack.errors import InvalidOptionError, UnsupportedPipelineError
from kvpack.memory import Memory
from kvpack.pipeline import Enabled, PackForcingMixin, enabled_class
from kvpack.registry import registry
from kvpack.stack import Stack

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def enable(pipeline: Pipeline, stack: str | Memory | Mapping[str, Any] = "packforcing", **options: Any) -> Pipeline:
    """Lets a causal video pipeline generate any length in bounded memory (PackForcing, arXiv 2603.25730).

    The pipeline keeps its class name, components and call; `num_frames` may now exceed what the model was trained with.
    Enabling again replaces the stack.

    Args:
        pipeline: a diffusers pipeline that an installed adapter supports.
        stack: name of an installed stack, a `Stack` or other `Memory`, or what its `to_dict` gave.
        options: options of the named stack, e.g. `topk=16`; for those that are not given, the adapter may know better
            defaults for its model (`Adapter.default_options`) than the stack has.

    Returns:
        The same pipeline.

    Raises:
        UnsupportedPipelineError: if no adapter drives this pipeline, or something is switched on that cannot work.
        UnknownNameError: if a stack or policy is not installed.
        InvalidOptionError: if an option is unknown or wrong, or a compressor's weights are missing or another model's.
    """
    adapter = adapter_of(pipeline)
    adapter.check(pipeline)
    if isinstance(stack, str):
        configs = {name: part.config for name, part in pipeline.components.items() if hasattr(part, "config")}
        options = model_options(adapter, configs, stack, options)
    resolved = resolve_stack(stack, options)
    adapter.check_stack(pipeline, resolved)
    if not isinstance(pipeline, PackForcingMixin):
        pipeline.__class__ = enabled_class(type(pipeline))  # type: ignore[assignment]
    attach(pipeline, resolved)
    return pipeline


def disable(pipeline: Pipeline) -> Pipeline:
    """Makes it the stock pipeline of before, bit for bit; does nothing to one that is not enabled."""
    if isinstance(pipeline, PackForcingMixin):
        pipeline.__dict__.pop("_kvpack", None)
        pipeline.__class__ = pipeline._kvpack_base  # type: ignore[assignment]
    return pipeline


def model_options(
    adapter: Adapter, configs: Mapping[str, Mapping[str, Any]], stack: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of a stack by name for a model: those that are given, and the adapter's own for the rest."""
    return {**registry().taken(stack, adapter.default_options(configs, stack)), **options}


def resolve_stack(stack: str | Memory | Mapping[str, Any], options: Mapping[str, Any]) -> Memory:
    """The stack that a name with options, a dict or a `Stack` stands for.

    Raises:
        InvalidOptionError: if options are given with anything but a name, or are wrong.
    """
    if isinstance(stack, str):
        return registry().stack(stack, dict(options))
    if options:
        raise InvalidOptionError(
            f"options {sorted(options)} belong to a named stack; use dataclasses.replace on a Stack"
        )
    if isinstance(stack, Memory):
        return stack
    if "memory" in stack:
        return registry().policy("memory", stack["memory"], {k: v for k, v in stack.items() if k != "memory"})
    return Stack.from_dict(stack)


def attach(pipeline: Any, stack: Memory) -> None:
    """Puts the stack on a pipeline whose class is already the enabled one."""
    # Past DiffusionPipeline.__setattr__, which looks into the pipeline's config.
    before = vars(pipeline).get("_kvpack")
    kept = {} if before is None else {"fps": before.fps}
    object.__setattr__(pipeline, "_kvpack", Enabled(stack, adapter_of(pipeline), **kept))


def adapter_of(pipeline: Any) -> Adapter:
    """The installed adapter that drives a pipeline.

    Raises:
        UnsupportedPipelineError: if there is none.
    """
    adapter = registry().adapter(pipeline)
    if adapter is None:
        model = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None) or pipeline
        raise UnsupportedPipelineError(
            f"kvpack has no adapter for {type(model).__name__} in {type(pipeline).__name__}. "
            f'Installed: {", ".join(registry().names("adapter"))}. See README, "A new model"'
        )
    return adapter
