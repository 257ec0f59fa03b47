"""What else people do with a pipeline: copy, save, share, offload, adapt; all as stock."""

import copy
import pickle
from functools import partial

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from PIL import Image

import kvpack
from helpers import generated, quiet, rel_l2
from kvpack.adapters import attention
from kvpack.errors import BusyPipelineError, UnsupportedPipelineError
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 32,
    "num_frames": 25,  # 7 latent frames
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
PACKED = {"chunk_frames": 2, "sink_frames": 1, "recent_frames": 1, "topk": 1}
WINDOW = {"chunk_frames": 3, "window_frames": 6, "sink_frames": 1}


generate = partial(generated, **CALL)


def enable(pipe):
    return kvpack.enable(pipe, "self-forcing", **WINDOW)


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline())


def contents(value):
    """What a change would be seen in: the objects in a container, or the object itself."""
    if isinstance(value, dict):
        return [(key, id(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple, set)):
        return sorted(map(id, value)) if isinstance(value, set) else [id(each) for each in value]
    return id(value)


def trace(pipe):
    """Everything that hangs on the pipeline's modules and classes."""
    modules = {}
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            for path, module in component.named_modules():
                modules[name, path] = type(module), {key: contents(value) for key, value in vars(module).items()}
                registry = vars(module).get("_diffusers_hook")
                modules[name, path, "hooks"] = registry and (contents(registry.hooks), list(registry._hook_order))
    for attributes in (modules[each][1] for each in modules if each[0] == "vae" and len(each) == 2):
        for key in ("_feat_map", "_enc_feat_map", "_conv_num", "_conv_idx", "_enc_conv_num", "_enc_conv_idx"):
            attributes.pop(key, None)  # set by the VAE itself, whenever it encodes or decodes
    classes = [WanPipeline, WanAttnProcessor, type(pipe.transformer), type(pipe.vae), type(pipe.scheduler)]
    return modules, [dict(vars(cls)) for cls in classes]


@pytest.mark.parametrize("used_before", [False, True])
def test_disable_leaves_no_trace(used_before, pipe):
    stock = generate(pipe, guidance_scale=3.0, output_type="pt") if used_before else None
    HookRegistry.check_if_exists_or_initialize(pipe.transformer)  # a stock call makes the registry, and leaves it
    before, attributes = trace(pipe), dict(vars(pipe))
    enable(pipe)
    assert trace(pipe) == before  # between generations already
    generate(pipe, guidance_scale=3.0, output_type="pt")
    assert trace(pipe) == before
    assert type(pipe) is not WanPipeline
    assert pipe.disable_packforcing() is pipe
    assert type(pipe) is WanPipeline
    assert trace(pipe) == before
    if used_before:  # else there are what the upstream call itself sets
        assert set(vars(pipe)) == set(attributes)
        assert torch.equal(generate(pipe, guidance_scale=3.0, output_type="pt"), stock)
    assert "_kvpack" not in vars(pipe)
    assert not hasattr(pipe, "packforcing")
    pipe.disable_packforcing()  # a second time does nothing


def test_methods_and_functions_are_the_same(pipe):
    assert pipe.enable_packforcing("full") is pipe
    assert kvpack.disable(pipe) is pipe
    assert type(pipe) is WanPipeline


def test_the_class_keeps_its_name(pipe):
    enable(pipe)
    assert isinstance(pipe, WanPipeline)
    cls = type(pipe)
    assert (cls.__name__, cls.__module__, cls.__qualname__, cls.__doc__) == (
        WanPipeline.__name__,
        WanPipeline.__module__,
        WanPipeline.__qualname__,
        WanPipeline.__doc__,
    )
    assert repr(pipe).startswith("WanPipeline {")
    assert set(pipe.components) == set(WanPipeline.__init__.__code__.co_varnames[1:7])


def test_enabling_twice_replaces_the_stack(pipe):
    enable(pipe)
    cls, frames = type(pipe), generate(pipe)
    pipe.enable_packforcing("full", chunk_frames=4)
    assert type(pipe) is cls
    assert pipe.packforcing.stack.name == "full"
    assert not torch.equal(generate(pipe), frames)
    enable(pipe)
    assert torch.equal(generate(pipe), frames)
    pipe.disable_packforcing()
    assert type(pipe) is WanPipeline


def test_a_stack_or_its_data_can_be_given(pipe):
    frames = generate(enable(pipe))
    stack = pipe.packforcing.stack
    for given in (stack, stack.to_dict()):
        pipe.enable_packforcing(given)
        assert pipe.packforcing.stack == stack
        assert torch.equal(generate(pipe), frames)


def test_siblings_are_stock(pipe):
    stock = generate(pipe)
    frames = generate(enable(pipe))
    sibling = WanPipeline.from_pipe(pipe)
    assert type(sibling) is WanPipeline
    assert sibling.transformer is pipe.transformer
    sibling.set_progress_bar_config(disable=True)
    assert torch.equal(generate(sibling), stock)
    assert torch.equal(generate(pipe), frames)
    same = type(pipe).from_pipe(pipe)
    same.set_progress_bar_config(disable=True)
    assert torch.equal(generate(same), stock)  # the memory is switched on by enable only
    with pytest.raises(UnsupportedPipelineError, match="enable_packforcing"):
        same.packforcing.stats()
    assert torch.equal(generate(enable(same)), frames)
    assert type(same.disable_packforcing()) is WanPipeline


def test_video_to_video_sibling(pipe):
    # Video to video needs a scheduler with add_noise
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    video = [Image.new("RGB", (32, 16), (40 * i, 0, 99)) for i in range(5)]
    call = {key: CALL[key] for key in ("prompt", "height", "width", "guidance_scale", "max_sequence_length")}

    def convert():
        other = WanVideoToVideoPipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return other(video=video, num_inference_steps=4, generator=generator, output_type="pt", **call).frames

    stock = convert()
    enable(pipe)
    generate(pipe)
    assert torch.equal(convert(), stock)


def test_saved_and_loaded_as_stock(pipe, tmp_path):
    stock = generate(pipe)
    frames = generate(enable(pipe))
    pipe.save_pretrained(tmp_path)
    assert "kvpack" not in (tmp_path / "model_index.json").read_text()
    again = WanPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is WanPipeline
    assert rel_l2(generate(again), stock) <= 1e-6  # reloaded weights lie elsewhere in memory: other kernels
    assert rel_l2(generate(enable(again)), frames) <= 1e-6


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, *(lambda p, n=n: pickle.loads(pickle.dumps(p, protocol=n)) for n in (2, 5))],
    ids=["copy", "deepcopy", "pickle-2", "pickle-5"],
)
def test_copies_stay_enabled(duplicate, pipe):
    stock = generate(pipe)
    frames = generate(enable(pipe))
    twin = duplicate(pipe)
    assert twin is not pipe
    assert twin.packforcing.stack == pipe.packforcing.stack
    assert torch.equal(generate(twin), frames)
    assert type(twin.disable_packforcing()) is WanPipeline
    assert torch.equal(generate(twin), stock)
    assert torch.equal(generate(pipe), frames)  # the original is still enabled
    assert type(duplicate(pipe.disable_packforcing())) is WanPipeline


def test_what_has_our_processors_in_it_is_not_copied(pipe):
    frames, copied = generate(enable(pipe)), []

    def callback(pipe, step, timestep, tensors):
        for each in (pipe, pipe.transformer):
            with pytest.raises(BusyPipelineError, match="cannot be copied while a chunk is made"):
                copy.deepcopy(each)
        copied.append(copy.copy(pipe))  # shares the transformer, which gets its own processors back
        return tensors

    assert torch.equal(generate(pipe, callback_on_step_end=callback), frames)
    assert torch.equal(generate(copied[0]), frames)


def test_fused_projections(pipe):
    frames = generate(enable(pipe))
    pipe.transformer.fuse_qkv_projections()
    assert pipe.transformer.blocks[0].attn1.fused_projections
    assert rel_l2(generate(pipe), frames) < 1e-5
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(generate(pipe), frames)


def test_lora_and_its_scale(pipe):
    from peft import LoraConfig

    plain = generate(enable(pipe))
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.no_grad():
        for name, weight in pipe.transformer.named_parameters():
            if "lora" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 4)
    scaled = {scale: generate(pipe, attention_kwargs={"scale": scale}) for scale in (0.0, 0.5, 1.0)}
    assert rel_l2(scaled[0.0], plain) < 1e-5  # also in the commit: else history would hold the adapter's keys
    assert rel_l2(scaled[1.0], plain) > 1e-2
    assert torch.equal(generate(pipe), scaled[1.0])
    assert rel_l2(scaled[0.5], scaled[1.0]) > 1e-3
    pipe.transformer.disable_adapters()
    assert rel_l2(generate(pipe), plain) < 1e-5


def test_the_commit_sees_the_scale(pipe):
    seen = []
    enable(pipe)
    forward = pipe.transformer.forward

    def spy(*args, **kwargs):
        seen.append((float(kwargs["timestep"].max()) == 0, kwargs["attention_kwargs"]))
        return forward(*args, **kwargs)

    pipe.transformer.forward = spy
    generate(pipe, attention_kwargs={"scale": 0.25})
    assert [clean for clean, _ in seen] == [False, False, True] * 3
    assert all(kwargs == {"scale": 0.25} for _, kwargs in seen)
    assert pipe.transformer.forward is spy


@pytest.mark.parametrize("stack", ["self-forcing", "packforcing"])
def test_model_offload(stack, pipe):
    options = WINDOW if stack == "self-forcing" else PACKED
    stock = generate(pipe, output_type="pt")
    pipe.enable_packforcing(stack, **options)
    frames = generate(pipe, output_type="pt")
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # hooks must survive the first
        assert torch.equal(generate(pipe, output_type="pt"), frames)
    assert len(pipe._all_hooks) == 3
    assert all(hasattr(module, "_hf_hook") for module in (pipe.text_encoder, pipe.transformer, pipe.vae))
    pipe.disable_packforcing()
    assert torch.equal(generate(pipe, output_type="pt"), stock)


def test_models_are_freed_once_a_video(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(WanPipeline, "maybe_free_model_hooks", lambda self: freed.append(self))
    enable(pipe)
    generate(pipe)
    assert freed == [pipe]


@pytest.mark.parametrize(
    ("stack", "offload_type"),
    [
        ("self-forcing", "block_level"),
        ("packforcing", "leaf_level"),
        pytest.param("self-forcing", "leaf_level", marks=pytest.mark.slow),
        pytest.param("packforcing", "block_level", marks=pytest.mark.slow),
    ],
)
def test_group_offload(stack, offload_type, pipe):
    options = WINDOW if stack == "self-forcing" else PACKED
    stock = generate(pipe, output_type="pt")
    pipe.enable_packforcing(stack, **options)
    frames = generate(pipe, output_type="pt")
    cpu = torch.device("cpu")
    for module in (pipe.transformer, pipe.vae):
        arguments = {"onload_device": cpu, "offload_device": cpu, "offload_type": offload_type}
        apply_group_offloading(module, **arguments, num_blocks_per_group=1 if offload_type == "block_level" else None)
    before = trace(pipe)
    for _ in range(2):
        assert torch.equal(generate(pipe, output_type="pt"), frames)
    assert trace(pipe) == before
    pipe.disable_packforcing()
    assert torch.equal(generate(pipe, output_type="pt"), stock)


def test_attention_backend_is_kept(pipe):
    frames = generate(enable(pipe))
    pipe.transformer.set_attention_backend("_native_math")
    try:
        processors = [block.attn1.processor for block in pipe.transformer.blocks]
        assert all(each._attention_backend == AttentionBackendName._NATIVE_MATH for each in processors)
        seen = []
        generate(
            pipe,
            callback_on_step_end=lambda p, *_: (
                seen.append({block.attn1.processor._attention_backend for block in p.transformer.blocks}) or {}
            ),
        )
        assert seen == [{AttentionBackendName._NATIVE_MATH}] * 6
        assert rel_l2(generate(pipe), frames) < 1e-5
        assert [block.attn1.processor for block in pipe.transformer.blocks] == processors
    finally:
        pipe.transformer.reset_attention_backend()


def test_an_attention_backend_that_a_step_sets_is_kept(pipe, monkeypatch):
    used, dispatch = [], attention.dispatch_attention_fn

    def noted(*args, backend):
        used.append(backend)
        return dispatch(*args, backend=backend)

    monkeypatch.setattr(attention, "dispatch_attention_fn", noted)
    registry = attention_dispatch._AttentionBackendRegistry  # of the process: given back at the end
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    model, math = enable(pipe).transformer, AttentionBackendName._NATIVE_MATH
    processors = [each.processor for block in model.blocks for each in (block.attn1, block.attn2)]
    for change, before, wanted in (
        (lambda: model.set_attention_backend("_native_math"), None, math),
        (model.reset_attention_backend, math, None),
    ):
        used.clear()
        generate(pipe, num_frames=9, callback_on_step_end=lambda *_, change=change: change() or {})
        assert (used[0], used[-1]) == (before, wanted)  # in the step before, and in the one behind
        assert {each._attention_backend for each in processors} == {wanted}
        assert [each.processor for block in model.blocks for each in (block.attn1, block.attn2)] == processors


def test_processors_of_the_user_are_given_back(pipe):
    mine = [WanAttnProcessor() for _ in pipe.transformer.blocks]
    for block, processor in zip(pipe.transformer.blocks, mine, strict=True):
        block.attn1.set_processor(processor)
    generate(enable(pipe))
    assert all(block.attn1.processor is each for block, each in zip(pipe.transformer.blocks, mine, strict=True))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_bfloat16(guidance_scale, pipe):
    reference = generate(enable(pipe), guidance_scale=guidance_scale)
    pipe.disable_packforcing()
    stock32 = generate(pipe, guidance_scale=guidance_scale, num_frames=9)
    pipe.to(torch.bfloat16)
    stock16 = generate(pipe, guidance_scale=guidance_scale, num_frames=9)
    enable(pipe)
    frames = generate(pipe, guidance_scale=guidance_scale)
    assert torch.isfinite(frames).all()
    # as far from fp32 as the stock pipeline is, within a factor of chance
    assert rel_l2(frames.float(), reference) < 4 * rel_l2(stock16.float(), stock32)
    for reindexer in ("contiguous", "fit"):
        pipe.enable_packforcing(reindexer=reindexer, chunk_frames=2, sink_frames=1, recent_frames=1, topk=1)
        pixels = generate(pipe, output_type="np")
        assert pixels.shape == (1, 25, 16, 32, 3)
        assert pipe.packforcing.stats()["attended_bytes"] % 2 == 0


def test_other_schedulers_by_from_config(pipe):
    enable(pipe)
    frames = generate(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=7.0)
    assert not torch.equal(generate(pipe), frames)


def test_wan_2_2_small(pipe):
    """Per-token timesteps as in Wan 2.2 TI2V 5B."""
    pipe.register_to_config(expand_timesteps=True)
    stock = generate(pipe, num_frames=9)
    enable(pipe)
    assert rel_l2(generate(pipe, num_frames=9), stock) <= 1e-6
    assert torch.isfinite(generate(pipe)).all()
