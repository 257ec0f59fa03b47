"""Looks at all parts of a model, cheap enough for each chunk."""

from collections.abc import Iterator

from torch import nn


def submodules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and all parts of it, in any order; `modules()` takes five times as long.

    A part of two modules comes twice.

    >>> [type(each).__name__ for each in submodules(nn.Sequential(nn.Linear(1, 1)))]
    ['Sequential', 'Linear']
    """
    waiting = [model]
    while waiting:
        module = waiting.pop()
        yield module
        waiting += [part for part in module._modules.values() if part is not None]


def has_hooks(model: nn.Module) -> bool:
    """Return whether diffusers or accelerate have put a hook on a part, which may move it, cast it or leave it out."""
    for own in map(vars, submodules(model)):
        registry = own.get("_diffusers_hook")  # an empty one is on every model that was called by a pipeline
        if "_hf_hook" in own or (registry is not None and registry.hooks):
            return True
    return False
