"""Attention backends and caches: what cannot work is named before anything is computed."""

import types
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import hooks
from diffusers.hooks import HookRegistry
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

from helpers import enable_small, generated, quiet
from kvpack.errors import UnsupportedPipelineError
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 32,
    "num_frames": 21,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}


generate = partial(generated, **CALL)


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline())


# Attention backends


@pytest.mark.parametrize("backend", ["native", "_native_flash", "_native_math", "flex"])
def test_backends_that_run_on_a_cpu(backend, pipe):
    frames = generate(enable_small(pipe))
    pipe.transformer.set_attention_backend(backend)
    if backend == "flex" and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 has flex attention for heads of a power of two only")
    assert float((generate(pipe) - frames).norm() / frames.norm()) < 1e-5
    pipe.disable_packforcing()
    generate(enable_small(pipe))


def switch(pipe, backend):
    """`set_attention_backend` of a backend whose package is not installed here."""
    for block in pipe.transformer.blocks:
        for attention in (block.attn1, block.attn2):
            attention.processor._attention_backend = AttentionBackendName(backend)


@pytest.mark.parametrize("backend", ["xformers", "flash", "flash_hub", "_flash_3", "sage", "_native_cudnn"])
def test_backends_that_do_not(backend, pipe):
    message = rf"backend is {backend}, which does not run on cpu .*set_attention_backend\(\"native\"\)"
    switch(pipe, backend)
    with pytest.raises(UnsupportedPipelineError, match=message):
        enable_small(pipe)
    switch(pipe, "native")
    stream = enable_small(pipe).packforcing.stream(**CALL)
    next(stream)
    switch(pipe, backend)
    with pytest.raises(UnsupportedPipelineError, match=message):
        next(stream)
    switch(pipe, "native")
    generate(pipe)


def test_the_backend_of_the_process(pipe):
    """Processors without a backend of their own have that of the process, or of a context."""
    enable_small(pipe)
    with (
        attention_backend("_native_efficient"),
        pytest.raises(UnsupportedPipelineError, match="backend is _native_efficient"),
    ):
        generate(pipe)
    with attention_backend("_native_math"):
        generate(pipe)


# Caches

TIMESTEP = {"current_timestep_callback": lambda: 1}
CACHES = [
    (hooks.apply_first_block_cache, hooks.FirstBlockCacheConfig(threshold=0.1), "FBC"),
    (hooks.apply_faster_cache, hooks.FasterCacheConfig(**TIMESTEP), "FasterCache"),
    (
        hooks.apply_pyramid_attention_broadcast,
        hooks.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, **TIMESTEP),
        "PyramidAttentionBroadcast",
    ),
    (hooks.apply_taylorseer_cache, hooks.TaylorSeerCacheConfig(cache_identifiers=["blocks.1.attn1"]), "TaylorSeer"),
    (hooks.apply_mag_cache, hooks.MagCacheConfig(num_inference_steps=2, mag_ratios=[1, 1]), "MagCache"),
    (hooks.apply_sea_cache, hooks.SeaCacheConfig(), "SeaCache"),
    (hooks.apply_text_kv_cache, hooks.TextKVCacheConfig(), "TextKVCache"),
]


@pytest.mark.parametrize(("apply", "config", "name"), CACHES, ids=[name for *_, name in CACHES])
def test_caches(apply, config, name, pipe):
    frames = generate(enable_small(pipe))
    pipe.transformer.enable_cache(config)
    with pytest.raises(UnsupportedPipelineError, match=rf"{type(config).__name__}.*disable_cache"):
        generate(pipe)
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe), frames)
    apply(pipe.transformer, config)  # as `enable_cache` does, which alone tells the model
    with pytest.raises(UnsupportedPipelineError, match=rf"{name}\w*Hook is on .*remove_hook"):
        generate(pipe)


def test_layers_skipped_for_good(pipe):
    hooks.apply_layer_skip(pipe.transformer, hooks.LayerSkipConfig(indices=[1], fqn="blocks"))
    with pytest.raises(UnsupportedPipelineError, match=r"TransformerBlockSkipHook is on blocks.1"):
        enable_small(pipe)


def test_the_error_says_how_a_cache_is_taken_off(pipe):
    frames = generate(enable_small(pipe))
    hooks.apply_sea_cache(pipe.transformer, hooks.SeaCacheConfig())
    for _ in range(10):
        try:
            assert torch.equal(generate(pipe), frames)
            return
        except UnsupportedPipelineError as error:
            exec(str(error).split("take it off with ")[1], {"pipe": pipe})
    raise AssertionError("the cache is still there")


def teacache(self, *args, **kwargs):
    """As TeaCache replaces a forward; this one goes on to the stock one."""
    return self.stock_forward(*args, **kwargs)


def test_teacache_on_the_class(pipe):
    cls = type(pipe.transformer)
    pipe.transformer.__class__ = type(cls.__name__, (cls,), {"forward": teacache, "stock_forward": cls.forward})
    with pytest.raises(UnsupportedPipelineError, match="forward was replaced, as TeaCache does"):
        enable_small(pipe)
    pipe.transformer.__class__ = type(cls.__name__, (cls,), {"teacache_threshold": 0.1})
    with pytest.raises(UnsupportedPipelineError, match="TeaCache"):
        enable_small(pipe)
    pipe.transformer.__class__ = cls
    generate(enable_small(pipe))


@pytest.mark.parametrize("forwards", [1, 2, 6])
def test_a_cache_that_nothing_tells_of(forwards, pipe):
    """A forward of the instance's own that gives an old output now and then is caught when it leaves layers out."""
    frames = generate(enable_small(pipe))
    stock, calls, kept = pipe.transformer.forward, 0, None

    def forward(self, *args, **kwargs):
        nonlocal calls, kept
        calls += 1
        kept = kept if kept is not None and calls % (forwards + 1) == 0 else stock(*args, **kwargs)
        return kept

    pipe.transformer.forward = types.MethodType(forward, pipe.transformer)
    processors = [block.attn1.processor for block in pipe.transformer.blocks]
    with pytest.raises(UnsupportedPipelineError, match=r"left the self-attention of layers \[0, 1\] out.*TeaCache"):
        generate(pipe)
    del pipe.transformer.forward
    assert [block.attn1.processor for block in pipe.transformer.blocks] == processors
    assert not pipe.transformer._forward_hooks
    assert torch.equal(generate(pipe), frames)


def test_hooks_of_others_are_not_caches(pipe):
    class Mine(hooks.ModelHook):
        calls = 0

        def new_forward(self, module, *args, **kwargs):
            Mine.calls += 1
            forward: Any = self.fn_ref.original_forward
            return forward(*args, **kwargs)

    frames = generate(enable_small(pipe))
    HookRegistry.check_if_exists_or_initialize(pipe.transformer.blocks[0]).register_hook(Mine(), "mine")
    assert torch.equal(generate(pipe), frames)
    assert Mine.calls > 0
