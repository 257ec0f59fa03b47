"""What is generated equals what stock modules compute without any memory: a dense mask, or one stock call."""

from itertools import accumulate

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import kvpack
from helpers import quiet, seeded
from kvpack.policies import (
    AbsoluteReindexer,
    AllSelector,
    IdentityCompressor,
    SinkMidRecentPartitioner,
)
from kvpack.testing import tiny_wan_pipeline

SIZE = {"height": 32, "width": 48, "max_sequence_length": 8, "num_inference_steps": 2}
GRID = (2, 3)


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline(num_layers=3))


class MaskedProcessor(WanAttnProcessor):
    """Stock self-attention under a mask."""

    mask = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


def dense_mask(sizes, visible):
    """True where a token of one frame attends a token of another; `visible(end of the chunk, frame)`."""
    ends = [end for size, end in zip(sizes, accumulate(sizes), strict=True) for _ in range(size)]
    by_frame = torch.tensor([[visible(end, key) for key in range(len(ends))] for end in ends])
    tokens = GRID[0] * GRID[1]
    return by_frame.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)[None, None]


@torch.no_grad()
def dense_generation(pipe, noise, embeds, chunks, visible, steps=2, given=0):
    """Generation that recomputes the whole video in every step: clean frames at t = 0, one masked forward.

    The first `given` frames of the noise are clean latents; `chunks` is one length, or that of each chunk.
    """
    transformer, tokens = pipe.transformer, GRID[0] * GRID[1]
    processor, stock = MaskedProcessor(), [block.attn1.processor for block in transformer.blocks]
    for block in transformer.blocks:
        block.attn1.set_processor(processor)
    video, sizes = noise[:, :, :0], []
    for part in noise.split(chunks, dim=2):
        sizes.append(part.shape[2])
        if video.shape[2] < given:
            video = torch.cat([video, part], dim=2)
            continue
        pipe.scheduler.set_timesteps(steps)
        for t in pipe.scheduler.timesteps:
            whole = torch.cat([video, part], dim=2)
            processor.mask = dense_mask(sizes, visible)
            times = torch.cat([torch.zeros(video.shape[2] * tokens), t.expand(sizes[-1] * tokens)])
            times = times.expand(noise.shape[0], -1)
            flow = transformer(whole, timestep=times, encoder_hidden_states=embeds, return_dict=False)[0]
            part = pipe.scheduler.step(flow[:, :, -sizes[-1] :], t, part, return_dict=False)[0]
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


BEGINNINGS = {  # chunks, those of them that are given
    "independent first frame": ([1, 3, 3, 3], 0),
    "an image": ([1, 3, 3, 3], 1),
    "a clip": ([2, 3, 3, 3], 5),
    "a clip of whole chunks": ([3, 3, 3], 6),
}


@pytest.mark.parametrize("case", BEGINNINGS)
@pytest.mark.parametrize("limit", [None, 5], ids=["full", "window"])
def test_beginnings_equal_dense_masks(case, limit, pipe):
    sizes, count = BEGINNINGS[case]
    video = torch.rand(2, 4 * count - 3, 3, 32, 48, generator=seeded(2)) if count else None
    noise = torch.randn(2, 16, sum(sizes), 4, 6, generator=seeded())
    embeds = torch.randn(2, 8, 32, generator=seeded(1))
    if count:
        pixels = video.movedim(2, 1) * 2 - 1
        mean, std = (
            torch.tensor(each).view(1, -1, 1, 1, 1)
            for each in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        with torch.no_grad():
            noise[:, :, :count] = (pipe.vae.encode(pixels).latent_dist.mode() - mean) / std
    visible = (lambda end, key: key < end) if limit is None else window(3 + limit, 1)
    wanted = dense_generation(pipe, noise, embeds, sizes, visible, given=count)
    options = {} if limit is None else {"window_frames": 3 + limit, "sink_frames": 1}
    pipe.enable_packforcing("full" if limit is None else "self-forcing", chunk_frames=3, **options)
    pipe.packforcing.first_chunk_frames = sizes[0]
    begin = {"image": video[:, 0]} if count == 1 else {"video": video} if count else {}
    call = {"prompt_embeds": embeds, "latents": noise, "guidance_scale": 1.0, "output_type": "latent", **SIZE}
    given = pipe(**call, **begin).frames
    assert given.shape == wanted.shape
    assert float((given - wanted).abs().max() / wanted.abs().max()) < 1e-5
    pipe.packforcing.first_chunk_frames = None
    if not count:  # and it is not what chunks of three are
        assert float((pipe(**call).frames - wanted).abs().max() / wanted.abs().max()) > 1e-3


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
