"""Hooks on any part of a model are seen."""

import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from helpers import enable_small, quiet
from kvpack.generation.hooks import has_hooks
from kvpack.testing import tiny_wan_pipeline


def test_a_hook_on_any_part_is_seen_and_an_empty_registry_is_none():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)))
    assert not has_hooks(model)
    registry = HookRegistry.check_if_exists_or_initialize(model[1][0])
    assert not has_hooks(model)
    registry.register_hook(ModelHook(), "mine")
    assert has_hooks(model)
    registry.remove_hook("mine")
    assert not has_hooks(model)
    add_hook_to_module(model[1][0], AccelerateHook())
    assert has_hooks(model)


def test_the_device_of_a_chunk_is_the_stock_one(monkeypatch):
    """Diffusers walks through all modules for it, which is left to it where a hook may say it."""
    pipe, asked = enable_small(quiet(tiny_wan_pipeline())), []
    stock = pipe._kvpack_base._execution_device
    monkeypatch.setattr(
        pipe._kvpack_base, "_execution_device", property(lambda self: asked.append(self) or stock.fget(self))
    )

    def devices():
        pipe._kvpack.driving, pipe._kvpack.device = object(), None
        try:
            return pipe._execution_device, stock.fget(pipe), len(asked)
        finally:
            pipe._kvpack.driving = pipe._kvpack.device = None

    here, wanted, count = devices()
    assert here == wanted
    assert count == 0
    pipe.vae.to("meta")  # registered first, but not the first by its name
    here, wanted, count = devices()
    assert here == wanted == torch.device("cpu")
    assert count == 0
    HookRegistry.check_if_exists_or_initialize(pipe.vae.decoder).register_hook(ModelHook(), "mine")
    here, wanted, count = devices()
    assert here == wanted
    assert count == 1
