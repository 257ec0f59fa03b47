"""Every family without each of its parts, or with another decoder, beside stock: its result, or a line why not."""

import numpy as np
import pytest
import torch
from diffusers import (
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from helpers import clip, picture, quiet, seeded
from kvpack.errors import KVPackError, UnsupportedPipelineError
from kvpack.testing import (
    tiny_anyflow_far_pipeline,
    tiny_sana_wm_refiner,
    tiny_skyreels_v2_pipeline,
    tiny_wan_pipeline,
)

TEXT = {"prompt": "a red circle", "max_sequence_length": 8}
SIZE = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 1.0}
SHORT = {**TEXT, **SIZE, "num_frames": 5}
FAMILIES = {
    "wan": (tiny_wan_pipeline, SHORT, {"chunk_frames": 2}),
    "skyreels": (tiny_skyreels_v2_pipeline, SHORT, {"chunk_frames": 2}),
    "skyreels-image": (
        lambda: tiny_skyreels_v2_pipeline(pipeline_class=SkyReelsV2DiffusionForcingImageToVideoPipeline),
        {**SHORT, "image": picture(32)},
        {"chunk_frames": 2},
    ),
    "skyreels-video": (
        lambda: tiny_skyreels_v2_pipeline(pipeline_class=SkyReelsV2DiffusionForcingVideoToVideoPipeline),
        {**SHORT, "num_frames": 9, "video": list(clip(5, 32)[0].permute(0, 2, 3, 1).numpy()), "overlap_history": 5},
        {"chunk_frames": 3},
    ),
    "anyflow-far": (  # 128 tokens a frame, so that upstream pads nothing
        tiny_anyflow_far_pipeline,
        {
            **SHORT,
            "height": 128,
            "width": 256,
            "chunk_partition": [1, 1],
            "latents": torch.randn(1, 16, 2, 16, 32, generator=seeded()),
        },
        {"chunk_frames": 1},
    ),
    "sana-wm": (
        tiny_sana_wm_refiner,
        {
            "prompt": "a red circle",
            "fps": 24.0,
            "sana_latent": torch.randn(1, 4, 3, 2, 2, generator=seeded()),
            "block_size": 2,
        },
        {"chunk_frames": 2},
    ),
}


class TinyDecoder(ModelMixin, ConfigMixin):
    """A decoder such as people put in a VAE's place to look at a video early: it has what the stock call asks for."""

    @register_to_config
    def __init__(self, z_dim=16, scale_factor_temporal=4, scale_factor_spatial=8):
        super().__init__()
        self.register_to_config(latents_mean=[0.1] * z_dim, latents_std=[2.0] * z_dim)
        self.temperal_downsample = [False, True, True]
        self.pixels = torch.nn.Conv3d(z_dim, 3, 1)

    def decode(self, latents, return_dict=False):
        frames = 4 * latents.shape[2] - 3
        size = (frames, 8 * latents.shape[3], 8 * latents.shape[4])
        return (torch.nn.functional.interpolate(self.pixels(latents), size).tanh(),)


def outcome(pipe, call):
    """What a call gives, or the error that it ends with."""
    try:
        with torch.no_grad():
            made = pipe(**call, generator=seeded())
    except Exception as error:
        return error
    made = getattr(made, "frames", made)
    return made if isinstance(made, torch.Tensor) else torch.as_tensor(np.asarray(made))


def enabled_outcome(pipe, call, options):
    try:
        pipe.enable_packforcing("full", **options)
    except KVPackError as error:
        return error
    return outcome(pipe, call)


def agree(given, wanted):
    """Whether two outcomes are one: the same numbers, or a line of kvpack where stock has an error."""
    if isinstance(wanted, Exception):
        return (isinstance(given, KVPackError) and "\n" not in str(given)) or type(given) is type(wanted)
    return isinstance(given, torch.Tensor) and torch.allclose(given.float(), wanted.float(), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_is_missing(family):
    make, call, options = FAMILIES[family]
    calls = [{**call, "output_type": output_type} for output_type in ("latent", "np")]
    wholes = [enabled_outcome(quiet(make()), each, options) for each in calls]
    for part in quiet(make()).components:
        for each in calls:
            pipe = quiet(make())
            pipe.register_modules(**{part: None})
            wanted = stock = outcome(pipe, each)
            given = enabled_outcome(pipe, each, options)
            if isinstance(
                stock, torch.Tensor
            ):  # then the enabled pipeline, too, does without what it would make anyway
                wanted = next(whole for whole in wholes if whole.shape == stock.shape)
            assert agree(given, wanted), (part, each["output_type"], given, stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_calls_above_are_ones_that_stock_takes(family):
    make, call, options = FAMILIES[family]
    stock = outcome(quiet(make()), {**call, "output_type": "latent"})
    assert isinstance(stock, torch.Tensor), stock
    given = enabled_outcome(quiet(make()), {**call, "output_type": "latent"}, options)
    assert given.shape == stock.shape
    assert agree(given, stock) or family in ("skyreels-image", "skyreels-video", "sana-wm")  # their history is causal


@pytest.mark.parametrize("family", ["wan", "skyreels", "anyflow-far"])
def test_text_parts_are_not_needed_for_embeddings(family):
    make, call, options = FAMILIES[family]
    pipe = quiet(make())
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt("a red circle", do_classifier_free_guidance=False, max_sequence_length=8)
    pipe.register_modules(text_encoder=None, tokenizer=None, vae=None)
    call = {**call, "prompt": None, "prompt_embeds": embeds, "output_type": "latent"}
    wanted = outcome(pipe, call)
    assert isinstance(wanted, torch.Tensor), wanted
    assert agree(enabled_outcome(pipe, call, options), wanted)


@pytest.mark.parametrize("made_with", [True, False], ids=["made with it", "replaced later"])
@pytest.mark.parametrize("family", ["wan", "skyreels", "anyflow-far"])
def test_another_decoder_decodes_as_in_stock(family, made_with):
    make, call, options = FAMILIES[family]
    pipe = quiet(make())
    pipe = quiet(type(pipe)(**{**pipe.components, "vae": TinyDecoder()})) if made_with else pipe
    pipe.vae = TinyDecoder() if not made_with else pipe.vae
    call = {**call, "output_type": "pt"}
    wanted = outcome(pipe, call)
    assert isinstance(wanted, torch.Tensor), wanted
    assert agree(enabled_outcome(pipe, call, options), wanted)
    if family != "anyflow-far":
        longer = outcome(pipe, {**call, "num_frames": 17})
        assert longer.shape[1] == 17  # of several chunks, decoded at once
    with pytest.raises(UnsupportedPipelineError, match=r"a stream .* AutoencoderKLWan.* a TinyDecoder in its place"):
        pipe.packforcing.stream(**call)
    parts = list(pipe.packforcing.stream(**{**call, "output_type": "latent"}))
    assert parts[0].ndim == 5


def test_what_needs_a_vae_says_so_before_anything_is_computed():
    pipe = quiet(tiny_wan_pipeline())
    pipe.register_modules(vae=None)
    pipe.enable_packforcing("full", chunk_frames=2)
    pipe.transformer.forward = None  # nothing calls it
    for more, what in (
        ({"output_type": "np"}, 'output_type="np" needs a VAE, but this pipeline has none'),
        ({"output_type": "latent", "image": picture(32)}, "image= or video= needs a VAE"),
    ):
        with pytest.raises(UnsupportedPipelineError, match=what):
            pipe(**{**SHORT, "num_frames": 9, **more})
    with pytest.raises(UnsupportedPipelineError, match="needs a VAE"):
        pipe.packforcing.stream(**SHORT)
    pipe.vae = TinyDecoder()
    with pytest.raises(UnsupportedPipelineError, match=r"encoding frames.* a TinyDecoder in its place"):
        pipe(**{**SHORT, "num_frames": 9, "image": picture(32), "output_type": "latent"})
