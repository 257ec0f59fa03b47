"""Numbers of NumPy and torch are numbers: sizes, steps and seconds that come out of arrays."""

import json

import numpy as np
import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline

from helpers import generated, quiet, seeded
from kvpack.errors import InvalidOptionError
from kvpack.testing import (
    tiny_anyflow_far_pipeline,
    tiny_sana_wm_refiner,
    tiny_skyreels_v2_pipeline,
    tiny_wan_pipeline,
)

KINDS = {
    "np.int64": (np.int64, np.float64),
    "np.int32": (np.int32, np.float32),
    "array": (np.array, np.array),
    "tensor": (torch.tensor, torch.tensor),
}
CALL = {
    "prompt": "a red circle",
    "num_frames": 21,
    "height": 16,
    "width": 32,
    "num_inference_steps": 2,
    "max_sequence_length": 8,
    "guidance_scale": 2.0,
    "output_type": "latent",
}
FAMILIES = {
    "wan": (tiny_wan_pipeline, {**CALL, "num_videos_per_prompt": 2}),
    "skyreels": (tiny_skyreels_v2_pipeline, {**CALL, "causal_block_size": 2, "fps": 24, "overlap_history": 3}),
    "anyflow-far": (tiny_anyflow_far_pipeline, {**CALL, "chunk_partition": [1, 2, 2, 1]}),
    "sana-wm": (
        tiny_sana_wm_refiner,
        {"prompt": "a", "fps": 24.0, "block_size": 2, "sink_size": 1, "output_type": "latent"},
    ),
}


def converted(value, kind):
    """The same numbers as those of an array or a tensor."""
    whole, real = KINDS[kind]
    if isinstance(value, list):
        return [converted(each, kind) for each in value]
    if isinstance(value, int):
        return whole(value)
    return real(value) if isinstance(value, float) else value


def made(pipe, call):
    frames = pipe(**call, generator=seeded())
    return getattr(frames, "frames", frames)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_a_call(family, kind):
    make, call = FAMILIES[family]
    pipe = quiet(make()).enable_packforcing("full", chunk_frames=2)
    more = {}
    if family == "sana-wm":
        more = {"sana_latent": torch.randn(1, 4, 5, 2, 2, generator=seeded())}
    given = {name: converted(value, kind) for name, value in call.items()}
    assert torch.equal(made(pipe, {**given, **more}), made(pipe, {**call, **more}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_a_stack_a_schedule_and_the_pipeline(kind):
    sizes = {"chunk_frames": 2, "sink_frames": 1, "recent_frames": 2, "topk": 1, "archive_blocks": 3}
    pipe = quiet(tiny_wan_pipeline()).enable_packforcing(**sizes)
    plain = pipe.packforcing.stack
    pipe.enable_packforcing(**{name: converted(value, kind) for name, value in sizes.items()})
    assert json.dumps(pipe.packforcing.stack.to_dict()) == json.dumps(plain.to_dict())
    call = {name: value for name, value in CALL.items() if name != "prompt"}
    prompts = [(0, "a red circle"), (1, "blue"), (1.25, "green", "cut")]
    wanted = generated(pipe, prompt=prompts, **call)
    schedule = [(converted(seconds, kind), *rest) for seconds, *rest in prompts]
    assert torch.equal(generated(pipe, prompt=schedule, **call), wanted)
    pipe.packforcing.first_chunk_frames = converted(1, kind)
    pipe.packforcing.fps = converted(24.0, kind)
    assert (pipe.packforcing.first_chunk_frames, pipe.packforcing.fps) == (1, 24.0)
    assert json.dumps([pipe.packforcing.first_chunk_frames, pipe.packforcing.fps]) == "[1, 24.0]"


@pytest.mark.parametrize("wrong", [np.float64(29.5), torch.tensor(29.5), np.array([29, 29]), np.bool_(True)])
def test_other_numbers_are_refused_as_before(wrong):
    pipe = quiet(tiny_wan_pipeline()).enable_packforcing("full", chunk_frames=2)
    with pytest.raises(InvalidOptionError, match="num_frames must be a whole number"):
        generated(pipe, **{**CALL, "num_frames": wrong})


def test_stock_takes_them_too():
    """Which is why they are no wrong values here."""
    pipe = quiet(tiny_skyreels_v2_pipeline(pipeline_class=SkyReelsV2DiffusionForcingPipeline))
    call = {**CALL, "num_frames": 5}
    given = {name: converted(value, "np.int64") for name, value in call.items()}
    assert torch.equal(generated(pipe, **given), generated(pipe, **call))


@pytest.mark.parametrize("wrong", [1, "a", [1], [seeded(), 1], (seeded(),), np.int64(1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_is_no_generator(family, wrong):
    make, call = FAMILIES[family]
    pipe = quiet(make()).enable_packforcing("full", chunk_frames=2)
    if family == "sana-wm":
        call = {**call, "sana_latent": torch.randn(1, 4, 5, 2, 2)}
    with pytest.raises(
        InvalidOptionError, match=r"generator must be a torch.Generator, .* got .*; e.g. torch.Gen"
    ) as e:
        pipe(**call, generator=wrong)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("wrong", [1.5, "2", True, 0, 5])
def test_a_first_chunk_has_a_whole_number_of_frames(wrong):
    pipe = tiny_wan_pipeline().enable_packforcing()
    with pytest.raises(InvalidOptionError, match="first_chunk_frames: a chunk has 1 to 4 latent frames"):
        pipe.packforcing.first_chunk_frames = wrong
    pipe.packforcing.first_chunk_frames = np.int64(2)
    with pytest.raises(InvalidOptionError, match=r"first_chunk_frames: a chunk has 1 to 1 latent frames .* got 2"):
        pipe.enable_packforcing("self-forcing", chunk_frames=1)


@pytest.mark.parametrize("wrong", [None, "x", True, 0, -1.0, float("nan"), float("inf")])
def test_a_frame_rate_is_a_number(wrong):
    pipe = tiny_wan_pipeline().enable_packforcing()
    with pytest.raises(InvalidOptionError, match="fps must be a number > 0, got"):
        pipe.packforcing.fps = wrong
    pipe.packforcing.fps = np.float32(24)
    assert pipe.packforcing.fps == 24.0
