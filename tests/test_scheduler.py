"""The few-step sampler, with kvpack and without."""

import logging

import pytest
import torch
from diffusers import FlowMatchLCMScheduler, WanPipeline

import kvpack
from helpers import quiet, seeded
from kvpack.errors import InvalidOptionError
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 4,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline(scheduler=kvpack.FlowMatchFewStepScheduler()))


def test_timesteps_are_those_of_the_checkpoint():
    scheduler = kvpack.FlowMatchFewStepScheduler()
    scheduler.set_timesteps(4)
    assert torch.allclose(scheduler.timesteps, torch.tensor([1000.0, 937.5, 833.33331, 625.0]), atol=1e-4)
    assert scheduler.sigmas[-1] == 0
    scheduler.set_timesteps()
    assert len(scheduler.timesteps) == 4


def test_other_sigmas():
    scheduler = kvpack.FlowMatchFewStepScheduler(sigmas=(1.0, 0.5), shift=1.0)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [1000.0, 500.0]
    scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.1])
    assert torch.allclose(scheduler.timesteps, torch.tensor([1000.0, 900.0, 100.0]))


def test_wrong_number_of_steps(pipe):
    with pytest.raises(InvalidOptionError, match=r"4 fixed sigmas.*num_inference_steps=4, got 5"):
        pipe(**{**CALL, "num_inference_steps": 5})
    pipe.enable_packforcing("full", chunk_frames=2)
    with pytest.raises(InvalidOptionError, match="num_inference_steps=4, got 50"):
        pipe(**{**CALL, "num_inference_steps": 50})
    assert pipe(**CALL).frames.shape[2] == 2


def test_config_round_trip(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    scheduler = kvpack.FlowMatchFewStepScheduler(sigmas=(1.0, 0.6, 0.3), shift=8.0)
    scheduler.save_pretrained(tmp_path)
    again = kvpack.FlowMatchFewStepScheduler.from_pretrained(tmp_path)
    again.set_timesteps(3)
    scheduler.set_timesteps(3)
    assert torch.equal(again.timesteps, scheduler.timesteps)
    assert list(again.config.sigmas) == [1.0, 0.6, 0.3]
    assert again.config.shift == again.shift == 8.0
    assert kvpack.FlowMatchFewStepScheduler.from_config(scheduler.config).config.shift == 8.0
    assert "will be ignored" not in caplog.text
    FlowMatchLCMScheduler.from_config({"nonsense": 1})
    assert "will be ignored" in caplog.text  # it would have been seen


def test_takes_the_shift_of_another_scheduler(pipe):
    from diffusers import FlowMatchEulerDiscreteScheduler

    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert kvpack.FlowMatchFewStepScheduler.from_config(euler.config).config.shift == 3.0


def test_saved_inside_a_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = WanPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is kvpack.FlowMatchFewStepScheduler
    assert again.scheduler.config.shift == 5.0


def test_differs_from_lcm_in_the_generator_only():
    """The same noise gives the same step as the parent's."""
    ours, lcm = kvpack.FlowMatchFewStepScheduler(), FlowMatchLCMScheduler(shift=5.0)
    ours.set_timesteps(4)
    lcm.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    flow, sample = torch.randn(2, 1, 4, 2, 2, 2, generator=seeded()).unbind()
    with ours.bound_generator(seeded(5)):
        given = ours.step(flow, ours.timesteps[0], sample).prev_sample
    wanted = lcm.step(flow, lcm.timesteps[0], sample, generator=seeded(5)).prev_sample
    assert torch.equal(given, wanted)


def test_works_in_a_stock_pipeline(pipe):
    torch.manual_seed(3)
    frames = pipe(generator=seeded(), **CALL).frames
    assert torch.isfinite(frames).all()
    torch.manual_seed(3)
    assert torch.equal(pipe(generator=seeded(), **CALL).frames, frames)


@pytest.mark.parametrize("several", [False, True], ids=["one", "list"])
def test_the_call_s_generator_is_honoured(several, pipe):
    def generator(seed):
        return [seeded(seed), seeded(seed + 1)] if several else seeded(seed)

    call = {**CALL, "prompt": ["a red circle", "the blue square"], "num_frames": 9}
    pipe.enable_packforcing("full", chunk_frames=2)
    torch.manual_seed(0)
    first = pipe(generator=generator(1), **call).frames
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(pipe(generator=generator(1), **call).frames, first)
    assert not torch.equal(pipe(generator=generator(7), **call).frames, first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # the global state was not touched
    assert pipe.scheduler._generator is None


def test_rows_with_generators_of_their_own(pipe):
    pipe.enable_packforcing("full", chunk_frames=2)
    prompts = ["a red circle", "the blue square"]
    both = pipe(generator=[seeded(1), seeded(2)], **{**CALL, "prompt": prompts, "num_frames": 13}).frames
    for row, prompt in enumerate(prompts):
        alone = pipe(generator=seeded(row + 1), **{**CALL, "prompt": prompt, "num_frames": 13}).frames
        assert float((both[row] - alone[0]).abs().max()) <= 1e-5
