"""What is generated equals what stock modules compute without any memory: a dense mask, or one stock call."""

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import kvpack
from kvpack.policies import (
    AbsoluteReindexer,
    AllSelector,
    IdentityCompressor,
    SinkMidRecentPartitioner,
)
from kvpack.testing import tiny_wan_pipeline

SIZE = {"height": 32, "width": 48, "max_sequence_length": 8, "num_inference_steps": 2}
GRID = (2, 3)


@pytest.fixture(scope="module")
def shared():
    torch.set_num_threads(1)
    pipe = tiny_wan_pipeline(num_layers=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(shared):
    yield shared
    shared.disable_packforcing()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class MaskedProcessor(WanAttnProcessor):
    """Stock self-attention under a mask."""

    mask = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


def dense_mask(frames, chunk, visible):
    """True where a token of one frame attends a token of another; `visible(end of the chunk, frame)`."""
    by_frame = torch.tensor([[visible((f // chunk + 1) * chunk, key) for key in range(frames)] for f in range(frames)])
    tokens = GRID[0] * GRID[1]
    return by_frame.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)[None, None]


@torch.no_grad()
def dense_generation(pipe, noise, embeds, chunk, visible, steps=2):
    """Generation that recomputes the whole video in every step: clean frames at t = 0, one masked forward."""
    transformer, tokens = pipe.transformer, GRID[0] * GRID[1]
    processor, stock = MaskedProcessor(), [block.attn1.processor for block in transformer.blocks]
    for block in transformer.blocks:
        block.attn1.set_processor(processor)
    video = noise[:, :, :0]
    for part in noise.split(chunk, dim=2):
        pipe.scheduler.set_timesteps(steps)
        for t in pipe.scheduler.timesteps:
            whole = torch.cat([video, part], dim=2)
            processor.mask = dense_mask(whole.shape[2], chunk, visible)
            times = torch.cat([torch.zeros(video.shape[2] * tokens), t.expand(chunk * tokens)])
            times = times.expand(noise.shape[0], -1)
            flow = transformer(whole, timestep=times, encoder_hidden_states=embeds, return_dict=False)[0]
            part = pipe.scheduler.step(flow[:, :, -chunk:], t, part, return_dict=False)[0]
        video = torch.cat([video, part], dim=2)
    for block, each in zip(transformer.blocks, stock, strict=True):
        block.attn1.set_processor(each)
    return video


def window(frames, sink):
    return lambda end, key: key < end and (key < sink or key >= end - (frames - sink))


DENSE = {
    "full": (("full", {"chunk_frames": 3}), 3, lambda end, key: key < end),
    "full-of-single-frames": (("full", {"chunk_frames": 1}), 1, lambda end, key: key < end),
    "window": (("self-forcing", {"chunk_frames": 3, "window_frames": 9, "sink_frames": 0}), 3, window(9, 0)),
    "window-and-sink": (("self-forcing", {"chunk_frames": 3, "window_frames": 9, "sink_frames": 3}), 3, window(9, 3)),
    "cut-to-the-frame": (("self-forcing", {"chunk_frames": 3, "window_frames": 8, "sink_frames": 2}), 3, window(8, 2)),
    "window-within-a-chunk": (
        ("self-forcing", {"chunk_frames": 4, "window_frames": 9, "sink_frames": 5}),
        4,
        window(9, 5),
    ),
}


@pytest.mark.parametrize("case", DENSE)
def test_equals_dense_masks(case, pipe):
    (stack, options), chunk, visible = DENSE[case]
    frames = 24 if chunk != 1 else 7
    noise = torch.randn(2, 16, frames, 4, 6, generator=seeded())
    embeds = torch.randn(2, 8, 32, generator=seeded(1))
    wanted = dense_generation(pipe, noise, embeds, chunk, visible)
    pipe.enable_packforcing(stack, **options)
    given = pipe(prompt_embeds=embeds, latents=noise, guidance_scale=1.0, output_type="latent", **SIZE).frames
    assert float((given - wanted).abs().max() / wanted.abs().max()) < 1e-5
    # and a mask that is one frame off would not have passed
    other = dense_generation(pipe, noise, embeds, chunk, lambda end, key: visible(end, key) and key != 1)
    assert float((given - other).abs().max() / wanted.abs().max()) > 1e-3


@pytest.mark.parametrize(
    "sizes", [(2, 4), *(pytest.param(each, marks=pytest.mark.slow) for each in ((3, 3), (5, 1), (0, 4)))]
)
def test_what_is_not_compressed_is_not_lost(sizes, pipe):
    """Sink, mid and recent with nothing made smaller are the full history, however they are cut."""
    kept = kvpack.Stack(
        "kept",
        SinkMidRecentPartitioner(*sizes),
        IdentityCompressor(),
        AllSelector(),
        AbsoluteReindexer(),
        chunk_frames=3,
    )
    call = {"prompt": "a red circle", "num_frames": 57, "guidance_scale": 1.0, "output_type": "latent", **SIZE}
    pipe.enable_packforcing("full", chunk_frames=3)
    wanted = pipe(generator=seeded(), **call).frames
    pipe.enable_packforcing(kept)
    given = pipe(generator=seeded(), **call).frames
    assert float((given - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("output_type", ["latent", "pt", "np"])
def test_one_chunk_is_the_stock_video(guidance_scale, output_type, pipe):
    call = {
        "prompt": ["a red circle", "the blue square"],
        "negative_prompt": ["night", "grass"],
        "num_frames": 13,
        "guidance_scale": guidance_scale,
        "output_type": output_type,
        **SIZE,
    }
    stock = torch.as_tensor(np.asarray(pipe(generator=seeded(), **call).frames))
    pipe.enable_packforcing("full", chunk_frames=4)
    given = torch.as_tensor(np.asarray(pipe(generator=seeded(), **call).frames))
    assert given.shape == stock.shape
    assert float((given - stock).norm() / stock.norm()) <= 1e-6


def test_second_chunk_depends_on_the_first(pipe):
    """Sensitivity: the memory is really attended."""
    call = {"prompt": "a red circle", "guidance_scale": 1.0, "output_type": "latent", **SIZE}
    noise = torch.randn(1, 16, 6, 4, 6, generator=seeded())
    pipe.enable_packforcing("full", chunk_frames=3)
    given = pipe(latents=noise, **call).frames[:, :, 3:]
    alone = pipe(latents=noise[:, :, 3:], **call).frames
    assert float((given - alone).norm() / given.norm()) > 1e-2
