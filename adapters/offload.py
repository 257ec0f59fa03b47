"""Modules that diffusers moves in and out of the accelerator, and that are called in parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def onload(module: Any) -> None:
    """Let model or group offloading bring a module in, when a part of it is called instead of its forward."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(module)
    group = _offload_group(module)
    if group is not None:
        group.onload_()
        if group.stream is not None:
            group.stream.synchronize()


@contextmanager
def onloaded(module: Any) -> Iterator[None]:
    """Do as `onload` for the length of a block of code; the module's group goes out again."""
    onload(module)
    yield
    group = _offload_group(module)
    if group is not None:
        group.offload_()


def _offload_group(module: Any) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("group_offloading")
    return None if hook is None else hook.group
