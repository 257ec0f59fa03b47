"""SkyReels-V2 videos that go on from an image or a clip, through the pipelines that are made for it."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
)
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor

import helpers
from helpers import distance, quiet, seeded
from kvpack.errors import InvalidOptionError, NonFiniteLatentsError
from kvpack.plugins.registry import registry
from kvpack.shipped import demo_stack
from kvpack.testing import check_adapter, tiny_skyreels_v2_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 32,
    "width": 32,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}


clip = partial(helpers.clip, size=32)


picture = partial(helpers.picture, 32)


@pytest.fixture
def from_image():
    return quiet(tiny_skyreels_v2_pipeline(pipeline_class=SkyReelsV2DiffusionForcingImageToVideoPipeline))


@pytest.fixture
def from_clip():
    return quiet(tiny_skyreels_v2_pipeline(pipeline_class=SkyReelsV2DiffusionForcingVideoToVideoPipeline))


def drawn(*frames, rows=1):
    """Noise as kvpack draws it, chunk by chunk."""
    generator = seeded()
    return torch.cat([torch.randn(rows, 16, each, 4, 4, generator=generator) for each in frames], dim=2)


class FrameCausal(SkyReelsV2AttnProcessor):
    """Stock self-attention in which a frame of four tokens attends itself and those before it."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        frame = torch.arange(hidden_states.shape[1]) // 4
        mask = (frame[None] <= frame[:, None])[None, None]
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


def test_an_image_equals_upstream_under_a_causal_mask(from_image):
    """Upstream keeps the image with blocks of one frame only, for which it has no mask; so the test lends it one."""
    noise = drawn(5)
    stock = [block.attn1.processor for block in from_image.transformer.blocks]
    call = {**CALL, "image": picture(), "num_frames": 17, "latents": noise}
    for block in from_image.transformer.blocks:
        block.attn1.set_processor(FrameCausal())
    wanted = from_image(**{**call, "latents": noise.clone()}, ar_step=3).frames
    for block, each in zip(from_image.transformer.blocks, stock, strict=True):
        block.attn1.set_processor(each)
    from_image.enable_packforcing("full", chunk_frames=1)
    given = from_image(**call).frames
    assert torch.equal(given[:, :, 0], wanted[:, :, 0])  # the very bits of upstream's encoding
    assert distance(given, wanted) < 1e-5
    other = from_image(**{**call, "image": picture(2)}).frames
    assert distance(given[:, :, 1:], other[:, :, 1:]) > 1e-3


@pytest.mark.parametrize("rows", [1, 2])
def test_a_clip_equals_upstreams_masked_forward(rows, from_clip):
    """Of 25 frames the last 13, four latents, and two blocks of two behind them."""
    new = drawn(2, 2, rows=rows)
    whole = torch.cat([torch.zeros(rows, 16, 4, 4, 4), new], dim=2)
    call = {**CALL, "prompt": [CALL["prompt"]] * rows, "video": clip(25), "num_frames": 29, "overlap_history": 13}
    prepare = from_clip.prepare_latents

    def with_noise(*args, **kwargs):
        _, frames, prefix, count = prepare(*args, **kwargs)
        return whole.clone(), frames, prefix, count

    from_clip.prepare_latents = with_noise
    wanted = from_clip(**call, ar_step=3, causal_block_size=2).frames
    del from_clip.prepare_latents
    from_clip.transformer.register_to_config(num_frame_per_block=1)
    from_clip.enable_packforcing("full", chunk_frames=2)
    given = from_clip(**call, generator=seeded()).frames
    assert torch.equal(given[:, :, :4], wanted[:, :, :4])
    assert distance(given, wanted) < 1e-5
    assert from_clip.packforcing.stats()["chunks"] == 4
    other = from_clip(**{**call, "video": clip(25, seed=2)}, generator=seeded()).frames
    assert distance(given[:, :, 4:], other[:, :, 4:]) > 1e-3


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_frames_are_laid_out_as_upstreams(output_type, from_clip):
    """The clip comes first, then what was generated, which begins with the overlap again."""
    call = {**CALL, "video": clip(9), "num_frames": 13, "overlap_history": 5, "output_type": output_type}
    stock = from_clip(**call, generator=seeded()).frames
    from_clip.enable_packforcing("full", chunk_frames=2)
    given = from_clip(**call, generator=seeded()).frames
    assert len(given[0]) == len(stock[0]) == 9 + 13
    stock, given = (np.stack([np.asarray(each) for each in frames[0]]) for frames in (stock, given))
    assert np.array_equal(given[:9], stock[:9])
    assert np.abs(given[9:14].astype(float) - stock[9:14]).max() <= (1 if output_type == "pil" else 1e-5)  # of 255
    parts = list(from_clip.packforcing.stream(**call, generator=seeded()))
    assert np.array_equal(np.concatenate([np.stack([np.asarray(each) for each in part[0]]) for part in parts]), given)
    assert [len(part[0]) for part in parts] == [9 + 5, 8]


def test_a_whole_clip_is_gone_on_from_without_overlap_history(from_clip):
    """Which upstream needs."""
    with pytest.raises(TypeError):
        from_clip(**CALL, video=clip(9), num_frames=25)
    from_clip.enable_packforcing("full", chunk_frames=4)
    given = from_clip(**CALL, video=clip(9), num_frames=25, generator=seeded()).frames
    wanted = from_clip(**CALL, video=clip(9), num_frames=25, overlap_history=9, generator=seeded()).frames
    assert torch.equal(given, wanted)
    assert given.shape[2] == 7


def test_a_clip_of_any_length_is_gone_on_from(from_clip, caplog, monkeypatch):
    """From its last frames that the VAE can encode, and the user is told; upstream keeps others, which end earlier."""
    from_clip.enable_packforcing("full", chunk_frames=2)
    call = {**CALL, "num_frames": 17, "generator": seeded()}
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    given = from_clip(**call, video=clip(10), overlap_history=8).frames
    assert "from the last 5" in caplog.text
    wanted = from_clip(**{**call, "generator": seeded()}, video=clip(10)[:, -5:]).frames
    assert torch.equal(given, wanted)


class TwoBlocks(SkyReelsV2AttnProcessor):
    """Stock self-attention in which the first frame of four tokens attends itself, and the others attend all."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        tokens = torch.arange(hidden_states.shape[1])
        mask = ((tokens[:, None] >= 4) | (tokens[None] < 4))[None, None]
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_last_image_equals_upstream_under_a_mask(rows, from_image):
    """One chunk between an image and the other: upstream's synchronous schedule, but for the mask of the first."""
    noise = drawn(4, rows=rows)
    stock = [block.attn1.processor for block in from_image.transformer.blocks]
    call = {**CALL, "prompt": [CALL["prompt"]] * rows, "image": picture(), "num_frames": 13, "latents": noise}
    call["last_image"] = picture(2)
    for block in from_image.transformer.blocks:
        block.attn1.set_processor(TwoBlocks())
    wanted = from_image(**{**call, "latents": noise.clone()}).frames
    for block, each in zip(from_image.transformer.blocks, stock, strict=True):
        block.attn1.set_processor(each)
    from_image.enable_packforcing("full", chunk_frames=4)
    given = from_image(**call).frames
    assert given.shape == wanted.shape == (rows, 16, 5, 4, 4)  # the end is among the latents, as upstream
    assert distance(given, wanted) < 1e-5
    other = from_image(**{**call, "last_image": picture(3)}).frames
    assert distance(given[:, :, 1:4], other[:, :, 1:4]) > 1e-4


@pytest.mark.parametrize("options", [{"stack": "full"}, {"topk": 2}, {"topk": 2, "compressor": "lr"}], ids=str)
def test_the_last_chunk_alone_goes_towards_the_last_image(options, from_image):
    sizes = {} if options.get("stack") else {"sink_frames": 2, "recent_frames": 2}
    from_image.enable_packforcing(chunk_frames=2, **options, **sizes)
    call = {**CALL, "image": picture(), "num_frames": 29, "output_type": "pt"}  # 1, 2, 2, 2 and 1 with the end
    without = from_image(**call, generator=seeded()).frames
    frames = from_image(**call, last_image=picture(2), generator=seeded()).frames
    assert frames.shape == without.shape == (1, 29, 3, 32, 32)  # the end itself is not shown, as upstream
    assert torch.equal(frames[:, :25], without[:, :25])
    assert distance(frames[:, 25:], without[:, 25:]) > 1e-3
    parts = list(from_image.packforcing.stream(**call, last_image=picture(2), generator=seeded()))
    assert [each.shape[1] for each in parts] == [1, 8, 8, 8, 4]
    assert torch.equal(torch.cat(parts, dim=1), frames)
    assert from_image.packforcing.stats()["frames"] == 9  # the last chunk with the end in it is whole, and committed


def test_a_short_chunk_before_the_last_image(from_image):
    """One frame and the end, where chunks have three; every other frame is what it would be in chunks of three."""
    from_image.enable_packforcing("full", chunk_frames=3)
    call = {**CALL, "image": picture(), "num_frames": 17, "latents": drawn(5)}
    without = from_image(**call).frames
    given = from_image(**call, last_image=picture(2)).frames
    assert given.shape[2] == without.shape[2] + 1
    assert torch.equal(given[:, :, :4], without[:, :, :4])
    assert distance(given[:, :, 4:5], without[:, :, 4:5]) > 1e-3


def test_each_video_has_its_own_beginning(from_image, from_clip):
    images = torch.rand(2, 3, 32, 32, generator=seeded())
    for pipe, name, given in ((from_image, "image", images), (from_clip, "video", clip(5, rows=2))):
        pipe.enable_packforcing("full", chunk_frames=2)
        call = {**CALL, "num_frames": 17}
        both = pipe(**{**call, "prompt": [CALL["prompt"]] * 2, name: given}, generator=[seeded(0), seeded(1)]).frames
        for row in range(2):
            alone = pipe(**{**call, name: given[row : row + 1]}, generator=seeded(row)).frames
            assert distance(both[row : row + 1], alone) < 1e-5


def test_what_is_given_is_committed_and_never_denoised(from_image):
    seen = []
    handle = from_image.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append((kwargs["hidden_states"].shape[2], bool((kwargs["timestep"] == 0).all()))),
        with_kwargs=True,
    )
    from_image.enable_packforcing("full", chunk_frames=3)
    from_image(**{**CALL, "guidance_scale": 1.0}, image=picture(), num_frames=25)
    handle.remove()
    assert seen == [(1, True), *[(3, False)] * 3, (3, True), *[(3, False)] * 3, (3, True)]


def test_check_adapter_with_an_image():
    def call(chunks):
        small = {"num_inference_steps": 1, "height": 16, "width": 16, "base_num_frames": 400, "generator": seeded()}
        return {**CALL, **small, "image": picture(), "num_frames": 1 + 16 * (chunks - 1)}

    check_adapter(quiet(tiny_skyreels_v2_pipeline(pipeline_class=SkyReelsV2DiffusionForcingImageToVideoPipeline)), call)


def test_check_adapter_with_a_clip():
    def call(chunks):
        small = {"num_inference_steps": 1, "height": 16, "width": 16, "base_num_frames": 400, "generator": seeded()}
        return {**CALL, **small, "video": clip(29), "overlap_history": 13, "num_frames": 16 * chunks - 3}

    check_adapter(quiet(tiny_skyreels_v2_pipeline(pipeline_class=SkyReelsV2DiffusionForcingVideoToVideoPipeline)), call)


@pytest.mark.parametrize("options", [{"compressor": "lr"}, {"compressor": "pool"}, {"commit": "last-step"}], ids=str)
def test_compressed_and_streamed(options, from_image):
    from_image.enable_packforcing(chunk_frames=2, sink_frames=2, recent_frames=2, topk=2, **options)
    call = {**CALL, "image": picture(), "num_frames": 49, "output_type": "pt", "num_inference_steps": 1}
    whole = from_image(**call, generator=seeded()).frames
    parts = list(from_image.packforcing.stream(**call, generator=seeded()))
    assert [each.shape[1] for each in parts] == [1, *[8] * 6]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_callbacks_and_offloading_are_the_users(from_image, monkeypatch):
    given, freed = [], []
    base = SkyReelsV2DiffusionForcingImageToVideoPipeline
    monkeypatch.setattr(base, "maybe_free_model_hooks", lambda pipe: freed.append(pipe is from_image))
    from_image.enable_packforcing("full", chunk_frames=2)

    def callback(pipe, step, timestep, tensors):
        given.append(pipe is from_image)
        pipe._interrupt = len(given) == 4
        return tensors

    latents = from_image(**CALL, image=picture(), num_frames=49, callback_on_step_end=callback).frames
    assert latents.shape[2] == 1 + 2 + 2  # interrupted in the second of six chunks, which is still returned
    assert set(given) == {True}
    assert freed == [True]  # once, at the end


def test_model_offload(from_image):
    call = {**CALL, "image": picture(), "num_frames": 17, "output_type": "pt"}
    stock = from_image(**call, generator=seeded()).frames
    from_image.enable_packforcing("full", chunk_frames=2)
    frames = from_image(**call, generator=seeded()).frames
    from_image.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # hooks must survive the first
        assert torch.equal(from_image(**call, generator=seeded()).frames, frames)
    assert len(from_image._all_hooks) == 3
    from_image.disable_packforcing()
    assert torch.equal(from_image(**call, generator=seeded()).frames, stock)
    from_image.remove_all_hooks()


def test_siblings_are_stock_ones(from_image):
    from_image.enable_packforcing("full", chunk_frames=2)
    sibling = SkyReelsV2DiffusionForcingPipeline.from_pipe(from_image)
    assert not hasattr(type(sibling), "packforcing")
    assert sibling.transformer is from_image.transformer


IMAGE = {
    "alone": ({"last_image": picture()}, InvalidOptionError, "behind 6 .* of 2, .* num_frames=21 or 29"),
    "no room": ({"last_image": picture(), "causal_block_size": 1}, InvalidOptionError, "causal_block_size of 2"),
    "an end without an end": ({"last_image": picture(), "num_frames": None}, InvalidOptionError, "endless"),
    "not finite end": (
        {"last_image": torch.full((1, 3, 32, 32), float("nan")), "num_frames": 21},
        NonFiniteLatentsError,
        "finite pixels",
    ),
    "embeddings": ({"image": None, "image_embeds": torch.ones(1, 1)}, InvalidOptionError, "pass image instead"),
    "not finite": ({"image": torch.full((1, 3, 32, 32), float("nan"))}, NonFiniteLatentsError, "finite pixels"),
    "too many": ({"image": torch.rand(3, 3, 32, 32)}, InvalidOptionError, "one for each of 1 videos, got 3"),
    "too short": ({"num_frames": 1}, InvalidOptionError, "give a larger num_frames"),
    "no image": ({"image": None}, ValueError, "Provide either `image`"),
}
CLIP = {
    "none": ({"video": None}, InvalidOptionError, "video is None"),
    "overlap": ({"overlap_history": 0}, InvalidOptionError, "overlap_history must be >= 1"),
    "too short": ({"num_frames": 9}, InvalidOptionError, "give a larger num_frames"),
    "async": ({"ar_step": 2}, InvalidOptionError, "ar_step=0"),
}


@pytest.mark.parametrize("case", IMAGE)
def test_wrong_images(case, from_image):
    changed, error, words = IMAGE[case]
    from_image.enable_packforcing("full", chunk_frames=2)
    with pytest.raises(error, match=words):
        from_image(**{**CALL, "image": picture(), "num_frames": 25, **changed})


@pytest.mark.parametrize("case", CLIP)
def test_wrong_clips(case, from_clip):
    changed, error, words = CLIP[case]
    from_clip.enable_packforcing("full", chunk_frames=2)
    with pytest.raises(error, match=words):
        from_clip(**{**CALL, "video": clip(9), "num_frames": 25, **changed})


@pytest.mark.slow
@pytest.mark.parametrize("stack", sorted(registry().names("stack")))
def test_every_memory_goes_on_from_an_image_under_two_prompts(stack, from_image):
    from_image.enable_packforcing(demo_stack(stack))
    call = {**CALL, "height": 16, "width": 16, "image": picture(), "num_frames": 81, "num_inference_steps": 2}
    call["prompt"] = [(0, "a red circle"), (2, "the blue square")]
    latents = from_image(**call, generator=seeded()).frames
    assert latents.shape == (1, 16, 21, 2, 2)
    assert bool(latents.isfinite().all())
    frames = from_image.packforcing.stack.chunk_frames
    assert from_image.packforcing.stats()["frames"] == 1 - (-20 // frames) * frames
    streamed = list(from_image.packforcing.stream(**call, generator=seeded()))
    assert torch.equal(torch.cat(streamed, dim=2), latents)
