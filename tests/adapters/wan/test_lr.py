"""The latent-space compressor through the pipeline: twins made at commit, out of the stream's own pixels."""

import pytest
import torch

from helpers import archived, generated, ledger, quiet, rel_l2, row_seeds, twins
from kvpack.adapters.wan.compression import embed
from kvpack.adapters.wan.vae import StreamingDecoder, encode
from kvpack.policies import LowResolutionCompressor
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": ["a red circle", "the blue square"],
    "height": 64,
    "width": 96,
    "num_frames": 45,  # 12 latent frames: three chunks
    "num_inference_steps": 2,
    "max_sequence_length": 8,
    "output_type": "latent",
}
OPTIONS = {"chunk_frames": 4, "sink_frames": 4, "recent_frames": 0, "topk": 4}


def generate(pipe, seed=0, **changed):
    return generated(pipe, **{"generator": row_seeds(seed), "guidance_scale": 1.0, **CALL, **changed})


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline()).enable_packforcing("packforcing", **OPTIONS, compressor="lr")


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_each_latent_frame_is_decoded_once(guidance_scale, output_type, pipe, decoded):
    frames = generate(pipe, guidance_scale=guidance_scale, output_type=output_type)
    assert decoded == [4, 4, 4]
    assert frames.shape[0] == 2
    assert torch.isfinite(frames).all()
    stats = pipe.packforcing.stats()
    assert stats["archive_blocks"] == 2
    assert stats["attended_tokens"] == 4 * 24 + 2 * 1 * 1  # the sink, and the twin of the second chunk


def test_pixels_in_the_loop_are_the_video(pipe):
    """What the compressor decoded on the way is what the user gets."""
    latents = generate(pipe, guidance_scale=4.0)
    pixels = generate(pipe, guidance_scale=4.0, output_type="pt")
    with torch.no_grad():
        whole = StreamingDecoder(pipe.vae, 64, 96)(latents)
    assert torch.equal(pixels, pipe.video_processor.postprocess_video(whole, output_type="pt"))


def test_rows_are_independent(pipe):
    both = generate(pipe, guidance_scale=4.0)
    for row, prompt in enumerate(CALL["prompt"]):
        generator = torch.Generator().manual_seed(row)
        alone = generate(pipe, guidance_scale=4.0, prompt=prompt, generator=generator)
        assert float((both[row] - alone[0]).abs().max() / alone.abs().max()) <= 1e-5


@torch.no_grad()
def test_a_twin_is_the_model_s_own_keys_of_the_small_chunk(pipe):
    """The first layer's archive: shrunk pixels, encoded, embedded, through norm and projections at t = 0."""
    stream = pipe.packforcing.stream(
        generator=torch.Generator().manual_seed(0), **{**CALL, "prompt": "a red circle", "guidance_scale": 1.0}
    )
    first, second = next(stream), next(stream)
    (given,) = archived(pipe.packforcing.sessions["cond"])
    stream.close()

    decoder = StreamingDecoder(pipe.vae, 64, 96)
    decoder(first)
    pixels = decoder(second)
    assert pixels.shape[2] == 16
    small = torch.nn.functional.adaptive_avg_pool3d(pixels, (5, 16, 16))  # 1 + 4 frames, 4 x 6 tokens become 1 x 1
    tokens = embed(pipe.transformer, encode(pipe.vae, small))
    span = LowResolutionCompressor().span(4, 4, (4, 6))
    assert tokens.shape == (1, span.tokens, 24) == (1, 2, 24)
    assert span.coordinates.tolist() == [[0.5, 1.5, 2.5], [2.5, 1.5, 2.5]]

    transformer, block = pipe.transformer, pipe.transformer.blocks[0]
    text = pipe.encode_prompt("a red circle", None, False, max_sequence_length=8)[0]
    _, modulation, *_ = transformer.condition_embedder(torch.zeros(1), text, None)
    shift, scale, *_ = (block.scale_shift_table + modulation.unflatten(1, (6, -1)).float()).chunk(6, dim=1)
    hidden = block.norm1(tokens.float()) * (1 + scale) + shift
    keys, values = block.attn1.norm_k(block.attn1.to_k(hidden)), block.attn1.to_v(hidden)
    for each, wanted in zip(given, (keys, values), strict=True):
        assert rel_l2(each, wanted.unflatten(2, (2, -1))) < 1e-5


def test_twins_are_made_at_commit(pipe):
    """A chunk that will be compressed has its twin before it leaves the recent frames; the sink has none."""
    pipe.enable_packforcing("packforcing", chunk_frames=4, sink_frames=4, recent_frames=4, topk=4, compressor="lr")
    stream = pipe.packforcing.stream(
        generator=torch.Generator().manual_seed(0), **{**CALL, "prompt": "a red circle", "guidance_scale": 2.0}
    )
    held = []
    for _ in stream:
        for branch in ("cond", "uncond"):
            session = pipe.packforcing.sessions[branch]
            parts = [piece.part for piece in ledger(session).whole]
            held.append([(part, twin is not None) for part, twin in zip(parts, twins(session), strict=True)])
            assert session.stats()["archive_blocks"] == max(0, session.stats()["chunks"] - 2)
    both = [("sink", False), ("recent", True)]
    assert held == [[("sink", False)]] * 2 + [both] * 4


@pytest.mark.parametrize("sizes", [(3, 5), *(pytest.param(each, marks=pytest.mark.slow) for each in ((3, 1), (8, 4)))])
def test_sizes_that_are_no_multiples_of_the_chunk(sizes, pipe, decoded):
    sink, recent = sizes
    pipe.enable_packforcing(
        "packforcing", chunk_frames=4, sink_frames=sink, recent_frames=recent, topk=2, compressor="lr"
    )
    frames = generate(pipe, num_frames=93, height=32, width=48)
    assert frames.shape[2] == 24
    assert torch.isfinite(frames).all()
    assert decoded == [4] * 6
    stats = pipe.packforcing.stats()
    assert (stats["sink_tokens"], stats["recent_tokens"]) == (sink * 6, recent * 6)
