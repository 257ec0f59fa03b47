"""Rollouts of the original Self-Forcing code, reproduced through the public API (see golden_data/README.md)."""

import json
from collections import deque
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.schedulers import scheduling_flow_match_lcm
from safetensors.torch import load_file

import kvpack
from helpers import record_forwards, rel_l2
from kvpack.testing import tiny_wan_pipeline

DATA = Path(__file__).parent / "golden_data"
TOKENS = 96  # of a latent frame
CASES = {
    "full": {"stack": "full", "options": {}, "chunks": 7},
    "window": {"stack": "self-forcing", "options": {"window_frames": 6, "sink_frames": 0}, "chunks": 12},
    "deep-sink": {
        "stack": "deep-forcing",
        "options": {"window_frames": 9, "sink_frames": 4, "budget_frames": 0},
        "chunks": 12,
    },
}


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "rollouts.safetensors") | load_file(DATA / "deep-sink.safetensors")


@pytest.fixture(scope="module")
def pipeline(golden):
    transformer = WanTransformer3DModel(**json.loads((DATA / "transformer_config.json").read_text())).eval()
    transformer.load_state_dict(load_file(DATA / "weights.safetensors"), strict=True)
    pipe = tiny_wan_pipeline(scheduler=kvpack.FlowMatchFewStepScheduler())
    pipe.register_modules(transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rollout(pipe, golden, monkeypatch, chunks, stack, **options):
    """Latents of each chunk, and a copy of the attended keys and values of every layer after its commit."""
    noises = iter([eps for chunk in golden["renoise"].float() for eps in (*chunk, torch.zeros_like(chunk[0]))])

    def recorded(shape, generator=None, device=None, dtype=None):
        return next(noises).movedim(0, 1)[None].expand(shape)

    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", recorded)
    pipe.enable_packforcing(stack, chunk_frames=3, **options)
    stream = pipe.packforcing.stream(
        prompt_embeds=golden["prompt_embeds"],
        latents=golden["noise"][:, : 3 * chunks].float().transpose(1, 2),
        num_inference_steps=4,
        guidance_scale=1.0,
        output_type="latent",
    )
    layers = len(pipe.transformer.blocks)
    attended = deque(maxlen=layers)  # by the last forward, which is the commit
    record_forwards(monkeypatch, lambda keys, values: attended.append((keys[0].clone(), values[0].clone())))
    latents, memories = [], []
    for chunk in stream:
        latents.append(chunk.transpose(1, 2))
        memories.append(list(attended))
    pipe.disable_packforcing()
    assert torch.allclose(pipe.scheduler.timesteps, golden["timesteps"], atol=1e-4)
    return latents, memories


@pytest.mark.parametrize("name", CASES)
def test_reproduces_the_original_code(name, pipeline, golden, monkeypatch, record_property):
    case = CASES[name]
    latents, memories = rollout(pipeline, golden, monkeypatch, case["chunks"], case["stack"], **case["options"])
    wanted = golden[f"{name}.latents"].split(3, dim=1)
    assert len(latents) == len(wanted) == case["chunks"]
    errors = [rel_l2(*each) for each in zip(latents, wanted, strict=True)]
    largest = [float((a - b).abs().max()) for a, b in zip(latents, wanted, strict=True)]
    record_property("latents_rel_l2", max(errors))
    record_property("latents_max_abs", max(largest))
    assert max(errors) <= 2e-5
    assert max(largest) <= 1e-4

    compared = 0
    for key in golden:
        if key.startswith(f"{name}.") and "layer" in key:
            what, layer, chunk = key.removeprefix(f"{name}.").split("_")
            given = memories[int(chunk)][int(layer[-1])][what == "values"]
            error = rel_l2(given[::7], golden[key])
            record_property(key, error)
            assert error <= 2e-5, key
            compared += 1
    assert compared == {"full": 3, "window": 5, "deep-sink": 3}[name]


def test_the_window_holds_six_frames(pipeline, golden, monkeypatch):
    _, memories = rollout(pipeline, golden, monkeypatch, 4, "self-forcing", window_frames=6, sink_frames=0)
    assert [each[0][0].shape[0] // TOKENS for each in memories] == [3, 6, 6, 6]


@pytest.mark.parametrize(
    "options",
    [
        {"window_frames": 9, "sink_frames": 0},
        {"window_frames": 7, "sink_frames": 0},
        {"window_frames": 6, "sink_frames": 1},
    ],
    ids=["a-chunk-more", "a-frame-more", "a-sink"],
)
def test_another_window_is_told_apart(options, pipeline, golden, monkeypatch):
    latents, _ = rollout(pipeline, golden, monkeypatch, 5, "self-forcing", **options)
    wanted = golden["window.latents"].split(3, dim=1)
    assert rel_l2(latents[1], wanted[1]) <= 2e-5  # both windows still hold everything
    assert rel_l2(latents[4], wanted[4]) > 3e-3


def test_a_sink_that_stays_is_told_apart(pipeline, golden, monkeypatch):
    options = {"window_frames": 9, "sink_frames": 4}
    latents, _ = rollout(pipeline, golden, monkeypatch, 6, "self-forcing", **options)
    wanted = golden["deep-sink.latents"].split(3, dim=1)
    assert rel_l2(latents[2], wanted[2]) <= 2e-5
    assert rel_l2(latents[5], wanted[5]) > 1e-2


def test_positions_from_zero_are_told_apart(pipeline, golden, monkeypatch):
    latents, _ = rollout(pipeline, golden, monkeypatch, 3, "full", reindexer="contiguous")
    assert rel_l2(latents[2], golden["full.latents"][:, 6:9]) <= 2e-5  # the same as absolute while nothing was dropped
    shifted, memories = rollout(
        pipeline, golden, monkeypatch, 6, "self-forcing", window_frames=6, sink_frames=0, reindexer="contiguous"
    )
    # Attention sees differences of positions only, so the latents agree and the rotated keys do not.
    assert rel_l2(shifted[5], golden["window.latents"][:, 15:18]) <= 2e-5
    assert rel_l2(memories[5][0][0][::7], golden["window.keys_layer0_05"]) > 1e-1
