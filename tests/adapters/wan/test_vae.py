"""Streaming decode of the Wan VAEs is decoding at once, to the bit."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from helpers import seeded
from kvpack.adapters.wan.vae import StreamingDecoder, encode
from kvpack.errors import UnsupportedPipelineError

COMMON = {"dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.0, 0.7, 1.1]}
VAES = {
    "wan2.1": {"base_dim": 3, "z_dim": 16},
    "wan2.2": {
        "base_dim": 4,
        "decoder_base_dim": 4,
        "z_dim": 4,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
        **STATISTICS,
    },
}


@pytest.fixture(scope="module", params=VAES)
def vae(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKLWan(**COMMON, **VAES[request.param]).eval()


def statistics(vae):
    return (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std))


def at_once(vae, latents):
    mean, std = statistics(vae)
    return vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(7,), (3, 3, 1), (1,) * 7, (4, 3), (1, 6), (2, 2, 2, 1)], ids=str)
def test_streamed_equals_decoded_at_once(chunks, vae):
    latents = torch.randn(2, vae.config.z_dim, 7, 3, 4, generator=seeded(1))
    wanted = at_once(vae, latents)
    decoder = StreamingDecoder(vae, 48, 64)
    given = torch.cat([decoder(part) for part in latents.split(chunks, dim=2)], dim=2)
    assert given.shape[2] == 25
    assert torch.equal(given, wanted)
    assert wanted.std() > 1e-3


@torch.no_grad()
def test_two_decoders_and_a_stock_decode_in_between(vae):
    latents = torch.randn(2, 1, vae.config.z_dim, 4, 4, 4, generator=seeded(1))
    wanted = [at_once(vae, each) for each in latents]
    decoders = [StreamingDecoder(vae, 64, 64) for _ in latents]
    parts = [[], []]
    for frames in (slice(0, 2), slice(2, 3), slice(3, 4)):
        for part, decoder, each in zip(parts, decoders, latents, strict=True):
            part.append(decoder(each[:, :, frames]))
            assert torch.equal(at_once(vae, latents[0]), wanted[0])
            vae.encode(torch.zeros(1, 3, 5, 32, 32))
    for part, each in zip(parts, wanted, strict=True):
        assert torch.equal(torch.cat(part, dim=2), each)


@torch.no_grad()
def test_decoding_chunks_alone_would_not_do(vae):
    """Sensitivity: the feature cache matters."""
    latents = torch.randn(1, vae.config.z_dim, 4, 2, 2, generator=seeded(1))
    alone = torch.cat([at_once(vae, part) for part in latents.split(2, dim=2)], dim=2)
    assert alone.shape[2] == 10  # and not 13


@torch.no_grad()
def test_encode_is_the_normalised_mode(vae):
    pixels = torch.rand(2, 3, 5, 32, 32, generator=seeded(1)) * 2 - 1
    mean, std = statistics(vae)
    wanted = (vae.encode(pixels).latent_dist.mode() - mean) / std
    assert torch.equal(encode(vae, pixels), wanted)


def test_tiles_cannot_stream(vae):
    vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32)
    try:
        StreamingDecoder(vae, 32, 32)  # a single tile
        with pytest.raises(UnsupportedPipelineError, match="disable_tiling"):
            StreamingDecoder(vae, 32, 48)
    finally:
        vae.disable_tiling()
    StreamingDecoder(vae, 32, 48)
