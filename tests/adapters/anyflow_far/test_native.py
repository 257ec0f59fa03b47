"""The model's own embedding as a compressor, other compressors, upstream's padding, and backends."""

from functools import partial

import pytest
import torch

from helpers import archived, distance, generated, quiet, seeded
from kvpack import Stack
from kvpack.compressors.network import HighResolutionBranch
from kvpack.errors import InvalidOptionError
from kvpack.memory.blocks import LatentChunk
from kvpack.memory.rope import rotations
from kvpack.policies import AbsoluteReindexer, AllSelector, NativeCompressor, SinkMidRecentPartitioner
from kvpack.testing import check_policy, tiny_anyflow_far_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 64,
    "width": 80,  # 4 x 5 tokens: one column too many for whole patches
    "num_frames": 81,
    "num_inference_steps": 1,
    "max_sequence_length": 8,
    "output_type": "latent",
}


generate = partial(generated, **CALL)


@pytest.fixture
def pipe():
    return quiet(tiny_anyflow_far_pipeline())


def kept(recent_frames, compressor=None):
    """What upstream keeps: nothing is dropped, and what is older than the recent frames is compressed."""
    return Stack(
        "kept",
        SinkMidRecentPartitioner(0, recent_frames),
        compressor or NativeCompressor(),
        AllSelector(),
        AbsoluteReindexer(),
        chunk_frames=3,
    )


def test_native_keeps_the_contract():
    check_policy(NativeCompressor())
    with pytest.raises(InvalidOptionError, match="needs frames of at least 2x2 tokens, got 1x3"):
        NativeCompressor().span(0, 3, (1, 3))
    with pytest.raises(InvalidOptionError, match="window must be >= 1"):
        NativeCompressor(window=0)


def test_tokens_and_places_are_the_models_own(pipe):
    """What `_forward_far_patchify` and the rope of upstream make of frames that have left its full window."""
    latents, transformer = torch.randn(2, 16, 3, 8, 10, generator=seeded()), pipe.transformer
    pipe.enable_packforcing()
    seen = []

    def watch(module, args, output):
        seen.append((args[0], output))

    handle = transformer.far_patch_embedding.register_forward_hook(watch)
    given = generate(pipe)
    handle.remove()
    # One call for each chunk behind the sink, with its clean latents; the last one is short and not kept.
    assert all(torch.equal(args, given[:, :, 4 + 3 * i : 7 + 3 * i]) for i, (args, _) in enumerate(seen))
    assert [output.shape[2:] for _, output in seen] == [(3, 2, 2)] * 5
    frames = {"num_compressed_frames": 3}
    wanted = transformer._forward_far_patchify(torch.cat([latents, latents], dim=2), far_cfg=frames)[:, : 3 * 4]
    chunk = LatentChunk(
        latents, 0, (4, 5), None, None, None, (16, 16), 32, torch.float32, lambda each: embedded(transformer, each)
    )
    assert torch.equal(NativeCompressor().tokens(chunk), wanted)
    span = NativeCompressor().span(0, 3, (4, 5))
    sizes = {
        "total_frames": 3,
        "num_compressed_frames": 3,
        "full_frame_shape": (4, 5),
        "compressed_frame_shape": (2, 2),
    }
    turned = transformer.rope(sizes, torch.device("cpu"))["key"][0, 0]
    geometry = pipe._kvpack.adapter.geometry(
        {"transformer": transformer.config, "vae": pipe.vae.config}, 64, 80, torch.float32
    )
    assert torch.allclose(rotations(span.coordinates[None], geometry)[0, :, 0], turned.to(torch.complex64), atol=1e-6)


def embedded(transformer, latents):
    return transformer.far_patch_embedding(latents).flatten(2).transpose(1, 2)


def test_native_is_near_upstream_and_nearer_than_forgetting(pipe):
    """At the trained length: the same tokens, computed once where upstream computes them anew for every chunk."""
    noise = torch.randn(1, 16, 21, 8, 10, generator=seeded(3))
    call = {"latents": noise, "num_inference_steps": 2}
    upstream = generate(pipe, **call)
    pipe.enable_packforcing(kept(6))
    near = distance(generate(pipe, **call, upstream_padding=True), upstream)
    tokens = pipe.packforcing.stats()["attended_tokens"]
    pipe.enable_packforcing("self-forcing", window_frames=9, sink_frames=0)
    far = distance(generate(pipe, **call, upstream_padding=True), upstream)
    assert tokens == 13 * 4 + 6 * 20
    assert near < 0.004
    assert far > 5 * near


def test_tokens_that_are_appended_are_as_in_a_forward_of_their_own(pipe, monkeypatch):
    call = {"guidance_scale": 2.0}
    appended = generate(pipe.enable_packforcing(), **call)
    monkeypatch.setattr(
        "kvpack.adapters.anyflow_far.denoiser.AnyFlowFARDenoiser.appends_tokens", property(lambda _: False)
    )
    assert distance(generate(pipe, **call), appended) < 1e-5


@pytest.mark.parametrize("options", [{"commit": "last-step"}, {"compressor": NativeCompressor(project="direct")}])
def test_other_ways_of_native(options, pipe):
    plain = generate(pipe.enable_packforcing(), guidance_scale=2.0)
    other = generate(pipe.enable_packforcing(**options), guidance_scale=2.0)
    assert bool(other.isfinite().all())
    assert torch.equal(plain[:, :, :1], other[:, :, :1])
    assert distance(other, plain) > 1e-4


def test_direct_keys_of_the_first_layer_are_those_of_a_forward(pipe):
    def twins(project):
        pipe.enable_packforcing(kept(6, NativeCompressor(project=project)))
        stream = pipe.packforcing.stream(**CALL, generator=seeded(), guidance_scale=2.0)
        [next(stream) for _ in range(5)]
        (session,) = pipe.packforcing.sessions.values()
        assert list(pipe.packforcing.sessions) == ["uncond+cond"]
        archives = [archived(session, layer)[0] for layer in range(session.geometry.layers)]
        stream.close()
        return archives

    layers, direct = twins("layers"), twins("direct")
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(layers[0], direct[0], strict=True))
    assert not torch.allclose(layers[1][0], direct[1][0], atol=1e-3)


@pytest.mark.parametrize("compressor", ["pool", "geometric", pytest.param("lr", marks=pytest.mark.slow), "hr", "dual"])
def test_other_compressors(compressor, pipe):
    short = {"height": 32, "width": 32, "num_frames": 49}
    given = generate(pipe.enable_packforcing(compressor=compressor, sink_frames=1, recent_frames=3), **short)
    assert bool(given.isfinite().all())
    assert pipe.packforcing.stats()["archive_blocks"] >= 1


def test_weights_of_another_model_are_refused(pipe, tmp_path):
    HighResolutionBranch(channels=16, width=24, patch=(2, 2)).save_pretrained(tmp_path)
    with pytest.raises(InvalidOptionError, match="give weights trained for this model"):
        pipe.enable_packforcing(compressor=str(tmp_path))
    with pytest.raises(InvalidOptionError, match=r"has window 3, but a patch of this model is 2x2 tokens"):
        pipe.enable_packforcing(compressor=NativeCompressor(window=3))


def test_the_window_is_the_models():
    wide = tiny_anyflow_far_pipeline(compressed_patch_size=(1, 8, 8))
    assert wide.enable_packforcing().packforcing.stack.compressor == NativeCompressor(window=4)
    oblong = tiny_anyflow_far_pipeline(compressed_patch_size=(1, 4, 8))
    assert oblong.enable_packforcing().packforcing.stack.compressor.name == "keep-farthest"


def test_upstreams_padding_is_reproduced_on_request_only(pipe):
    noise = torch.randn(1, 16, 5, 8, 10, generator=seeded(3))
    call = {"latents": noise, "chunk_partition": [1, 2, 2], "num_inference_steps": 2, "guidance_scale": 2.0}
    upstream = generate(pipe, **call)
    pipe.enable_packforcing("full")
    plain = generate(pipe, **call)
    assert distance(generate(pipe, **call, upstream_padding=True), upstream) < 1e-5
    assert distance(plain, upstream) > 1e-3
    assert torch.equal(generate(pipe, **call), plain)


@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
def test_backends(backend, pipe):
    wanted = generate(pipe.enable_packforcing(), num_frames=41)
    pipe.transformer.set_attention_backend(backend)
    stock = pipe.transformer.blocks[0].attn1.processor
    given = generate(pipe, num_frames=41)
    assert distance(given, wanted) < 1e-5
    assert pipe.transformer.blocks[0].attn1.processor is stock
    if backend != "flex":
        pipe.disable_packforcing()
        with pytest.raises(ValueError, match="flex"):
            generate(pipe)


@pytest.mark.parametrize(
    ("frames", "options"),
    [
        (16 * 21, {"topk": 2, "archive_blocks": 8}),
        pytest.param(24 * 21, {}, marks=pytest.mark.slow),
    ],
)
def test_many_times_the_native_length_in_flat_memory(frames, options, pipe):
    pipe.enable_packforcing(**options)
    call = {**CALL, "height": 32, "width": 32, "num_frames": 4 * frames - 3, "generator": seeded()}
    held, tokens, total = [], [], 0
    for latents in pipe.packforcing.stream(**call):
        assert bool(latents.isfinite().all())
        stats, total = pipe.packforcing.stats(), total + latents.shape[2]
        held.append(stats["resident_bytes"])
        tokens.append(stats["attended_tokens"])
    assert total == frames
    half = len(held) // 2
    assert len(set(tokens[half:-1])) == 1
    assert max(held[half:]) == held[half]
