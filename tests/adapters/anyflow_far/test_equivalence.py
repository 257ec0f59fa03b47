"""An enabled `AnyFlowFARPipeline` equals the stock one wherever that keeps all of history whole."""

import pytest
import torch
from diffusers.pipelines.anyflow.pipeline_output import AnyFlowPipelineOutput

from helpers import distance, quiet, seeded
from kvpack.errors import InvalidOptionError
from kvpack.testing import check_adapter, tiny_anyflow_far_pipeline

#: 128 tokens a frame, so that upstream pads nothing.
CALL = {
    "prompt": "a red circle",
    "height": 128,
    "width": 256,
    "num_frames": 17,
    "chunk_partition": [1, 2, 2],
    "num_inference_steps": 2,
    "max_sequence_length": 8,
    "output_type": "latent",
}


def noise(frames=5, rows=1):
    return torch.randn(rows, 16, frames, 16, 32, generator=seeded(1))


@pytest.fixture
def pipe():
    return quiet(tiny_anyflow_far_pipeline(full_chunk_limit=4))


def both(pipe, **changed):
    """The stock pipeline's output, and that of the same call with all of history kept."""
    call = {**CALL, "latents": noise(), **changed}
    pipe.disable_packforcing()
    stock = pipe(**call).frames
    return stock, pipe.enable_packforcing("full", chunk_frames=2)(**call).frames


def test_the_adapter_keeps_the_contract(pipe):
    def call(chunks):
        frames = 2 * chunks - 1
        return {
            **CALL,
            "num_frames": 4 * frames - 3,
            "chunk_partition": [1] + [2] * (chunks - 1),
            "guidance_scale": 2.0,
            "num_inference_steps": 1,
            "height": 32,
            "width": 32,
            "generator": seeded(),
        }

    check_adapter(pipe, call)


def test_identity_is_upstream_and_disabling_gives_its_bits_back():
    pipe = tiny_anyflow_far_pipeline(full_chunk_limit=6, chunk_partition=(1, 1, 1, 1, 1))
    pipe.set_progress_bar_config(disable=True)
    single = {"chunk_partition": None, "num_inference_steps": 1}
    stock, given = both(pipe, **single)
    assert distance(given, stock) < 1e-5
    alone = pipe(**{**CALL, **single, "latents": noise()[:, :, 4:], "num_frames": 1}).frames
    assert distance(alone, stock[:, :, 4:]) > 1e-2  # what is before it is attended
    pipe.disable_packforcing()
    assert torch.equal(pipe(**{**CALL, **single, "latents": noise()}).frames, stock)


@pytest.mark.parametrize(
    "changed",
    [
        {"guidance_scale": 3.0, "negative_prompt": "night"},
        {"sigmas": [1.0, 0.6, 0.6, 0.2]},  # the model is not asked where two are the same
        {"timesteps": [1000.0, 300.0], "use_mean_velocity": False},
        {"prompt": ["a red circle", "night"], "latents": noise(rows=2), "chunk_partition": [2, 2, 1]},
    ],
    ids=["guidance", "sigmas", "timesteps", "batch"],
)
def test_arguments_mean_what_they_mean_upstream(changed, pipe):
    stock, given = both(pipe, **changed)
    assert distance(given, stock) < 1e-5


@pytest.mark.parametrize("kind", ["image", "clip", "latents"])
def test_a_given_beginning_is_upstreams(kind, pipe):
    clip = torch.rand(1, 1 if kind == "image" else 9, 3, 128, 256, generator=seeded(2))
    given = {"video_latents": noise(3).transpose(1, 2) / 2} if kind == "latents" else {"video": clip}
    stock, made = both(pipe, **given)
    frames = 1 if kind == "image" else 3
    assert torch.equal(made[:, :, :frames], stock[:, :, :frames])
    assert distance(made, stock) < 1e-5
    assert distance(made, both(pipe)[1]) > 1e-2


def test_callbacks_are_those_of_upstream(pipe):
    heard = []

    def callback(pipeline, step, timestep, tensors):
        heard.append((step, float(timestep), tensors["latents"].clone(), tensors["prompt_embeds"].shape))
        return {"latents": tensors["latents"] * 0.9}

    names = ["latents", "prompt_embeds"]
    stock, given = both(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert distance(given, stock) < 1e-5
    theirs, ours = heard[:6], heard[6:]
    assert [each[:2] for each in ours] == [each[:2] for each in theirs]
    assert [each[3] for each in ours] == [each[3] for each in theirs]
    assert all(distance(mine[2], other[2]) < 1e-5 for mine, other in zip(ours, theirs, strict=True))


def test_pixels_and_the_output_class_are_upstreams(pipe):
    stock, given = both(pipe, output_type="pt")
    assert given.shape == stock.shape == (1, 17, 3, 128, 256)
    assert float((given - stock).abs().max()) < 1e-4
    call = {**CALL, "latents": noise()}
    assert isinstance(pipe(**call), AnyFlowPipelineOutput)
    assert isinstance(pipe(**call, return_dict=False), tuple)
    parts = list(pipe.packforcing.stream(**{**call, "output_type": "pt"}))
    assert torch.equal(torch.cat(parts, dim=1), given)


def test_only_the_new_chunk_is_encoded_and_upstream_keeps_nothing(pipe):
    forwards = []

    def watch(_, args, kwargs):
        forwards.append((kwargs["hidden_states"].shape[1], kwargs.get("kv_cache") is None))

    handle = pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    both(pipe, num_inference_steps=1)
    handle.remove()
    assert [frames for frames, _ in forwards[:5]] == [1, 1, 2, 3, 2]  # the third is behind an encoding of all before it
    assert forwards[5:] == [(1, True)] * 2 + [(2, True)] * 4


def test_no_argument_of_kvpack_reaches_upstream(pipe):
    with pytest.raises(TypeError, match="upstream_padding"):
        pipe(**CALL, upstream_padding=True)
    pipe.enable_packforcing()
    with pytest.raises(InvalidOptionError, match=r"use_kv_cache=False cannot work here, since kvpack is the cache"):
        pipe(**CALL, use_kv_cache=False)


@pytest.mark.parametrize(("guidance_scale", "times"), [(1.0, 1), (3.0, 6)])
def test_the_prompt_is_projected_once(guidance_scale, times, pipe):
    """With guidance once in a chunk's upstream call, which joins its texts anew, and once in its commit."""
    pipe.enable_packforcing("full")
    to_k = pipe.transformer.blocks[0].attn2.to_k
    seen = []
    stock, to_k.forward = to_k.forward, lambda text: seen.append(text) or stock(text)
    try:
        pipe(generator=seeded(), guidance_scale=guidance_scale, **CALL)
    finally:
        del to_k.forward
    assert len(seen) == times
