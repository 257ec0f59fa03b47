"""The denoising block in a modular Wan pipeline."""

import numpy as np
import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    SkipLayerGuidance,
    UniPCMultistepScheduler,
)
from diffusers.modular_pipelines.wan import WanBlocks

from helpers import distance, quiet, seeded
from kvpack import FlowMatchFewStepScheduler
from kvpack.adapters.wan.modular import KVPackDenoiseStep
from kvpack.errors import InvalidOptionError, NonFiniteLatentsError, UnknownNameError, UnsupportedPipelineError
from kvpack.policies import TokenTrim
from kvpack.testing import tiny_wan_pipeline

SIZE = {"height": 32, "width": 48, "max_sequence_length": 8, "num_inference_steps": 3}
SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
}


@pytest.fixture
def whole():
    return quiet(tiny_wan_pipeline())


def modular(whole, step=None, guidance_scale=4.0, *, embedded=False, **components):
    blocks = WanBlocks()
    if embedded:  # upstream's text encoder step fails without guidance
        del blocks.sub_blocks["text_encoder"]
    if step is not None:
        blocks.sub_blocks["denoise"].sub_blocks["denoise"] = step
    pipe = blocks.init_pipeline()
    names = ["transformer", "vae", "scheduler", *([] if embedded else ["text_encoder", "tokenizer"])]
    guider = ClassifierFreeGuidance(guidance_scale=guidance_scale)
    pipe.update_components(**{**{name: whole.components[name] for name in names}, "guider": guider, **components})
    return pipe


def noise(frames=9, rows=1):
    return torch.randn(rows, 16, frames, 4, 6, generator=seeded())


STACKS = {
    "full": {"chunk_frames": 3},
    "packforcing": {"chunk_frames": 3, "sink_frames": 3, "recent_frames": 3, "topk": 1, "compressor": "lr"},
    "deep-forcing": {},
    "token-trim": {},
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("stack", STACKS)
def test_equals_the_pipeline(stack, guidance_scale, scheduler, whole):
    whole.scheduler = SCHEDULERS[scheduler]
    call = {name: each for name, each in SIZE.items() if name != "max_sequence_length"}
    embeds = torch.randn(2, 2, 8, 32, generator=seeded(1))
    call |= {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    step = KVPackDenoiseStep(stack, **STACKS[stack])
    state = modular(whole, step, guidance_scale, embedded=True)(latents=noise(18, 2), num_frames=69, **call)
    whole.enable_packforcing(stack, **STACKS[stack])
    wanted = whole(latents=noise(18, 2), guidance_scale=guidance_scale, output_type="latent", **call).frames
    assert float((state.get("latents") - wanted).abs().max() / wanted.abs().max()) < 1e-5
    stats = state.get("memory_stats")
    assert stats["attended_tokens"] == whole.packforcing.stats()["attended_tokens"]
    assert len(stats["branches"]) == (2 if guidance_scale > 1 else 1)


@pytest.mark.parametrize("retries", [0, 1], ids=["plain", "vetoed"])
def test_a_scheduler_that_draws_noise_takes_the_calls_generator(retries, whole, monkeypatch):
    monkeypatch.setattr(TokenTrim, "veto", lambda _, state, latents: (torch.ones(latents.shape[0]) > 0, state))
    stack, whole.scheduler = TokenTrim(chunk_frames=3, max_retries=retries), FlowMatchFewStepScheduler()
    embeds = torch.randn(2, 2, 8, 32, generator=seeded(1))
    call = {"latents": noise(rows=2), "height": 32, "width": 48, "num_frames": 33, "num_inference_steps": 4}
    call |= {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    pipe, tries = modular(whole, KVPackDenoiseStep(stack), 1.0, embedded=True), []
    whole.transformer.register_forward_hook(lambda *_: tries.append(1))
    given = pipe(generator=[seeded(1), seeded(2)], **call).get("latents")
    assert len(tries) == 3 * 4 * (1 + retries) + 2  # two chunks are committed
    assert torch.equal(pipe(generator=[seeded(1), seeded(2)], **call).get("latents"), given)
    assert not torch.equal(pipe(generator=[seeded(1), seeded(3)], **call).get("latents"), given)
    whole.enable_packforcing(stack)
    wanted = whole(generator=[seeded(1), seeded(2)], guidance_scale=1.0, output_type="latent", **call).frames
    assert distance(given, wanted) < 1e-5
    with pytest.raises(InvalidOptionError, match=r"generator must be a torch\.Generator"):
        pipe(generator=0, **call)


def test_one_chunk_is_the_stock_block(whole):
    call = {"prompt": "a red circle", "latents": noise(4), "num_frames": 13, "output_type": "np", **SIZE}
    stock = modular(whole)(**call)
    ours = modular(whole, KVPackDenoiseStep("full", chunk_frames=4))(**call)
    assert torch.allclose(ours.get("latents"), stock.get("latents"), atol=1e-5)
    assert np.allclose(ours.get("videos"), stock.get("videos"), atol=1e-5)


def test_the_last_chunk_may_be_shorter(whole):
    pipe = modular(whole, KVPackDenoiseStep("full", chunk_frames=3))
    long, short = (pipe(prompt="night", latents=noise(9)[:, :, :n], **SIZE).get("latents") for n in (9, 8))
    assert short.shape[2] == 8
    assert torch.equal(short[:, :, :6], long[:, :, :6])
    assert float((short[:, :, 6:] - long[:, :, 6:8]).abs().max()) > 1e-4  # it attends its own frames only


def test_guidance_in_some_steps(whole):
    guider = ClassifierFreeGuidance(guidance_scale=4.0, start=0.4, stop=1.0)
    step = KVPackDenoiseStep("full", chunk_frames=3)
    state = modular(whole, step, guider=guider)(prompt="night", latents=noise(), **SIZE)
    assert state.get("memory_stats")["branches"] == ["pred_cond", "pred_uncond"]
    plain = modular(whole, KVPackDenoiseStep("full", chunk_frames=3))(prompt="night", latents=noise(), **SIZE)
    assert not torch.equal(state.get("latents"), plain.get("latents"))


def test_what_cannot_work_is_refused(whole):
    with pytest.raises(UnknownNameError, match="no stack named 'pack'"):
        KVPackDenoiseStep("pack")
    guider = SkipLayerGuidance(
        skip_layer_guidance_layers=[0], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
    )
    pipe = modular(whole, KVPackDenoiseStep("full"), guider=guider)
    with pytest.raises(UnsupportedPipelineError, match=r"SkipLayerGuidance asks for .*pred_cond_skip"):
        pipe(prompt="night", latents=noise(8), **SIZE)


def test_an_error_leaves_a_stock_transformer(whole):
    stock = modular(whole)
    call = {"prompt": "night", "latents": noise(4), "num_frames": 13, **SIZE}
    before = stock(**call).get("latents")
    pipe = modular(whole, KVPackDenoiseStep("full", chunk_frames=2))
    with pytest.raises(NonFiniteLatentsError, match="chunk 0"):
        pipe(**{**call, "latents": noise(4) * torch.nan})
    assert torch.equal(stock(**call).get("latents"), before)
    assert not whole.transformer._forward_pre_hooks
