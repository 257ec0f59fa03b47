"""Modules that diffusers moves in and out of the accelerator, and that are called in parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def onload(module: Any) -> None:
    """Let model or group offloading bring a module in, when a part of it is called instead of its forward."""
    hook = getattr(module, "_hf_hook", None)  # accelerate's; its `pre_forward` is what apply_forward_hook calls
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(module)
    group = _offload_group(module)
    if group is not None:
        group.onload_()
        if group.stream is not None:
            # Weights come in on a stream of their own, for which the hook of a forward would wait.
            group.stream.synchronize()


@contextmanager
def onloaded(module: Any) -> Iterator[None]:
    """Do as `onload` for the length of a block of code; the module's group goes out again."""
    onload(module)
    try:
        yield
    finally:
        group = _offload_group(module)
        if group is not None:
            group.offload_()


def offload(module: Any) -> None:
    """Let model offloading take a module out for another one, which the pipeline's own order would leave in beside."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hasattr(hook, "prev_module_hook"):  # CpuOffload, of enable_model_cpu_offload(); others offload by themselves
        here, inside = next(module.parameters()).device, torch.device(hook.execution_device)
        if here.type == inside.type:  # not by `==`: "cuda" and "cuda:0" are two devices for torch
            hook.init_hook(module)  # which moves it to the CPU; `pre_forward` brings it back


def streams_in(module: Any) -> bool:
    """Return whether group offloading fetches a module ahead, in the order of the forwards before."""
    group = _offload_group(module)
    return group is not None and group.stream is not None


def _offload_group(module: Any) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("group_offloading")
    return None if hook is None else hook.group
