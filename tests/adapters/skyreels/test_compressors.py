"""Compressed history of SkyReels-V2: its twins hear what their chunk hears, also of the frame rate."""

import pytest
import torch

from helpers import archived, quiet, random_branch, row_seeds
from kvpack.adapters.skyreels.denoiser import SkyReelsDenoiser
from kvpack.policies import DualCompressor, HighResolutionCompressor, LowResolutionCompressor, PoolCompressor
from kvpack.testing import tiny_skyreels_v2_pipeline

CALL = {
    "prompt": ["a red circle", "the blue square"],
    "height": 32,
    "width": 48,
    "num_frames": 45,  # 12 latent frames: three chunks, of which the last attends a twin
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
OPTIONS = {"chunk_frames": 4, "sink_frames": 4, "recent_frames": 0, "topk": 4}


def enabled(compressor, **config):
    pipe = quiet(tiny_skyreels_v2_pipeline(**{"inject_sample_info": True, **config}))
    return pipe.enable_packforcing(**OPTIONS, compressor=compressor)


def archives(pipe, **changed):
    """The video, and keys and values of the second chunk's twin by branch and layer."""
    stream = pipe.packforcing.stream(**{**CALL, "generator": row_seeds(), **changed})
    video = torch.cat([next(stream) for _ in range(3)], dim=2)
    sessions = pipe.packforcing.sessions.values()
    found = [archived(each, layer)[0] for each in sessions for layer in range(each.geometry.layers)]
    stream.close()
    return video, found


COMPRESSORS = {
    "pool": lambda how: PoolCompressor(),
    "lr": lambda how: LowResolutionCompressor(project=how),
    "hr": lambda how: HighResolutionCompressor(random_branch().requires_grad_(False), project=how),
    "dual": lambda how: DualCompressor(random_branch().requires_grad_(False), project=how),
}


@pytest.mark.parametrize(
    ("name", "how"), [("pool", ""), *((name, how) for name in ("lr", "hr", "dual") for how in ("layers", "direct"))]
)
def test_rows_are_independent(name, how):
    pipe = enabled(COMPRESSORS[name](how))
    both = pipe(**CALL, generator=row_seeds()).frames
    for row, prompt in enumerate(CALL["prompt"]):
        alone = pipe(**{**CALL, "prompt": prompt}, generator=row_seeds()[row]).frames
        assert float((both[row] - alone[0]).abs().max() / alone.abs().max()) <= 1e-5


def test_tokens_appended_in_the_commit_are_as_in_a_forward_of_their_own(monkeypatch):
    found, forwards = [], []
    for rides in (True, False):
        monkeypatch.setattr(SkyReelsDenoiser, "appends_tokens", rides)
        pipe, count = enabled(DualCompressor(random_branch().requires_grad_(False))), []
        pipe.transformer.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        video, twins = archives(pipe)
        found.append([video, *(each for pair in twins for each in pair)])
        forwards.append(len(count))
    for appended, alone in zip(*found, strict=True):
        torch.testing.assert_close(appended, alone, rtol=1e-4, atol=1e-5)
    assert forwards[0] < forwards[1]


@pytest.mark.parametrize("fps", [16, 24])
def test_direct_projection_is_the_first_layer_of_a_forward(fps):
    """Also where the layers hear the frame rate."""
    (_, through), (_, direct), (_, other) = (
        archives(enabled(LowResolutionCompressor(project=how), num_layers=1), fps=rate)
        for how, rate in (("layers", fps), ("direct", fps), ("direct", 40 - fps))
    )
    for a, b, c in zip(*(sum(found, ()) for found in (through, direct, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(b, c, rtol=1e-2)


def test_a_bfloat16_model():
    pipe = enabled(DualCompressor(random_branch().requires_grad_(False))).to(torch.bfloat16)
    frames = pipe(**CALL, generator=row_seeds()).frames
    assert bool(frames.isfinite().all())
