"""Videos that begin with an image or a clip."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import helpers
from helpers import quiet, seeded
from kvpack.errors import InvalidOptionError, NonFiniteLatentsError
from kvpack.plugins.registry import registry
from kvpack.shipped import demo_stack
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 16,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline())


clip = partial(helpers.clip, size=16)


picture = partial(helpers.picture, 16)


@pytest.mark.parametrize("stack", sorted(registry().names("stack")))
def test_every_memory_goes_on_from_an_image(stack, pipe):
    pipe.enable_packforcing(demo_stack(stack))
    call = {**CALL, "num_frames": 81, "generator": seeded()}
    latents = pipe(image=picture(), **call).frames
    assert latents.shape == (1, 16, 21, 2, 2)
    assert bool(latents.isfinite().all())
    stats = pipe.packforcing.stats()
    frames = pipe.packforcing.stack.chunk_frames
    assert (stats["chunks"], stats["frames"]) == (1 - (-20 // frames), 1 - (-20 // frames) * frames)
    other = pipe(image=picture(2), **{**call, "generator": seeded()}).frames
    assert float((latents[:, :, 1:] - other[:, :, 1:]).abs().max()) > 1e-4  # it is attended


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "list"])
def test_all_kinds_of_clips(kind, pipe):
    given = clip(5)
    arrays = (given[0].movedim(1, -1).numpy() * 255).round().astype(np.uint8)
    images = [Image.fromarray(each) for each in arrays]
    exact = arrays.astype(np.float32) / 255
    clips = {"pil": images, "list": [images], "np": exact[None], "pt": torch.tensor(exact).movedim(-1, 1)[None]}
    pipe.enable_packforcing("full")
    wanted = pipe(video=clips["np"], num_frames=25, generator=seeded(), **CALL).frames
    assert torch.allclose(pipe(video=clips[kind], num_frames=25, generator=seeded(), **CALL).frames, wanted, atol=1e-5)


def test_a_clip_goes_on_as_the_video_that_it_is_of(pipe):
    """Given latents are history exactly as generated ones are."""
    pipe.enable_packforcing("full", chunk_frames=2)
    noise = torch.randn(1, 16, 8, 2, 2, generator=seeded())
    begun = pipe(video=clip(13), latents=noise, **CALL).frames
    sessions = {}

    def remember(pipe, step, timestep, tensors):
        sessions.update(pipe.packforcing.sessions)
        return tensors

    pipe(video=clip(13), latents=noise, callback_on_step_end=remember, **CALL)
    assert begun.shape[2] == 8
    assert sessions["cond"].frames == 8


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("options", [{"compressor": "lr"}, {"compressor": "pool"}, {"commit": "last-step"}], ids=str)
def test_streamed_and_whole_are_one(options, guidance_scale, pipe):
    pipe.enable_packforcing(chunk_frames=2, sink_frames=2, recent_frames=2, topk=2, **options)
    call = {**CALL, "guidance_scale": guidance_scale, "num_frames": 49, "output_type": "pt"}
    whole = pipe(image=picture(), generator=seeded(), **call).frames
    parts = list(pipe.packforcing.stream(image=picture(), generator=seeded(), **call))
    assert [each.shape[1] for each in parts] == [1, *[8] * 6]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_the_video_shows_what_was_given(pipe):
    pipe.enable_packforcing("full")
    call = {**CALL, "output_type": "np", "num_frames": 17, "generator": seeded()}
    frames = pipe(image=picture(), **call).frames
    first = pipe.video_processor.preprocess(picture(), height=16, width=16).unsqueeze(2)
    with torch.no_grad():
        shown = pipe.vae.decode(pipe.vae.encode(first).latent_dist.mode()).sample
    assert np.allclose(frames[0, 0], (shown[0, :, 0] / 2 + 0.5).clamp(0, 1).movedim(0, -1).numpy(), atol=1e-4)


def test_one_for_all_rows_or_one_for_each(pipe):
    pipe.enable_packforcing("full")
    call = {**CALL, "prompt": ["a red circle", "the blue square"], "num_frames": 33}
    noise = torch.randn(2, 16, 9, 2, 2, generator=seeded())
    both = pipe(image=picture(), latents=noise, **call).frames
    each = pipe(image=[picture(), picture(2)], latents=noise, **call).frames
    assert torch.allclose(both[0], each[0], atol=1e-5)
    assert not torch.allclose(both[1], each[1], atol=1e-3)
    with pytest.raises(InvalidOptionError, match="one image or clip, or one for each of 2 videos, got 3"):
        pipe(image=[picture()] * 3, latents=noise, **call)
    again = pipe(image=picture(), num_videos_per_prompt=2, **{**call, "num_frames": 13}).frames
    assert again.shape[0] == 4


def test_prompts_change_at_the_nearest_chunk(pipe):
    pipe.enable_packforcing("self-forcing", chunk_frames=4, window_frames=8)
    pipe.packforcing.fps = 4.0  # a latent frame a second
    call = {**CALL, "num_frames": 4 * 12 + 1, "generator": seeded()}
    one = pipe(image=picture(), **call).frames
    schedule = [(0, "a red circle"), (5, "the blue square")]
    two = pipe(image=picture(), **{**call, "prompt": schedule, "generator": seeded()}).frames
    changed = [index for index in range(13) if not torch.equal(one[:, :, index], two[:, :, index])]
    assert changed == list(range(5, 13))  # chunks are 1, 4, 4, 4 frames long


def test_wan_2_2_small(pipe):
    pipe.register_to_config(expand_timesteps=True)
    pipe.enable_packforcing("full")
    split = pipe(image=picture(), num_frames=33, generator=seeded(), **CALL).frames
    pipe.register_to_config(expand_timesteps=False)
    joint = pipe(image=picture(), num_frames=33, generator=seeded(), **CALL).frames
    assert float((split - joint).abs().max() / joint.abs().max()) < 1e-5


def test_interrupted_before_anything_is_generated(pipe):
    pipe.enable_packforcing("full")
    stream = pipe.packforcing.stream(image=picture(), generator=seeded(), **CALL)
    assert next(stream).shape[2] == 1
    stream.close()
    assert pipe.packforcing.stats()["frames"] == 1
    assert not pipe.packforcing.sessions


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"image": picture(), "video": clip(5)}, InvalidOptionError, "image or video, not both"),
        ({"video": clip(6)}, InvalidOptionError, r"1 \+ 4m frames for this VAE, got 6; e.g. 5"),
        ({"video": clip(25)}, InvalidOptionError, "7 latent frames, but the whole video has 7"),
        ({"image": clip(1)[0] * torch.nan}, NonFiniteLatentsError, "NaN"),
    ],
    ids=["both", "length", "nothing-left", "nan"],
)
def test_what_cannot_be_a_beginning(given, error, words, pipe):
    pipe.enable_packforcing("full")
    with pytest.raises(error, match=words):
        pipe(num_frames=25, generator=seeded(), **given, **CALL)


def test_a_stock_pipeline_takes_no_image(pipe):
    with pytest.raises(TypeError, match="image"):
        pipe(image=picture(), num_frames=9, **CALL)


def test_first_chunk_is_not_longer_than_the_rest(pipe):
    pipe.enable_packforcing("full")
    with pytest.raises(InvalidOptionError, match="1 to 4 latent frames"):
        pipe.packforcing.first_chunk_frames = 5
