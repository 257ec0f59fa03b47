"""The learned compressors through the pipeline: what they are before training, and how their tokens become keys."""

import copy
import pickle

import pytest
import torch

from helpers import archived, generated, quiet, random_branch, row_seeds, seeded
from kvpack.adapters.wan.denoiser import WanDenoiser
from kvpack.compressors.network import HighResolutionBranch
from kvpack.errors import InvalidOptionError, PolicyError
from kvpack.policies import DualCompressor, HighResolutionCompressor, LowResolutionCompressor
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": ["a red circle", "the blue square"],
    "height": 32,
    "width": 48,
    "num_frames": 45,  # 12 latent frames: three chunks, of which the last attends a twin
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
OPTIONS = {"chunk_frames": 4, "sink_frames": 4, "recent_frames": 0, "topk": 4}


def generate(pipe, **changed):
    return generated(pipe, **{"generator": row_seeds(), **CALL, **changed})


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline())


@pytest.fixture
def branch():
    return random_branch()


@pytest.fixture
def folder(branch, tmp_path):
    branch.save_pretrained(tmp_path / "compressor")
    return str(tmp_path / "compressor")


def enabled(pipe, compressor, **changed):
    return pipe.enable_packforcing(**{**OPTIONS, **changed}, compressor=compressor)


def archive(pipe, **options):
    """Keys and values of the second chunk's twin, by layer."""
    arguments = {**CALL, "prompt": "a red circle", "generator": seeded(), **options}
    stream = pipe.packforcing.stream(**arguments)
    for _ in range(2):
        next(stream)
    session = pipe.packforcing.sessions["cond"]
    found = [archived(session, layer)[0] for layer in range(session.geometry.layers)]
    stream.close()
    return found


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_an_untrained_dual_is_lr_bit_for_bit(guidance_scale, pipe):
    latents = {
        name: generate(enabled(pipe, name), guidance_scale=guidance_scale) for name in ("lr", "dual", "hr", "pool")
    }
    assert torch.equal(latents["dual"], latents["lr"])
    assert not torch.equal(latents["hr"], latents["lr"])
    assert not torch.equal(latents["pool"], latents["lr"])


def test_hr_decodes_nothing_for_itself(pipe, decoded, folder):
    frames = generate(enabled(pipe, HighResolutionCompressor(folder)))
    assert decoded == []
    assert torch.isfinite(frames).all()
    generate(pipe, output_type="pt")
    assert decoded == [4, 4, 4]
    generate(enabled(pipe, DualCompressor(folder)))
    assert decoded == [4, 4, 4] * 2


def test_who_needs_no_pixels_gets_none(pipe):
    class Liar(LowResolutionCompressor):
        needs_pixels = False

    enabled(pipe, Liar())
    with pytest.raises(PolicyError, match=r"Liar\.tokens asked for pixels, but its needs_pixels is False"):
        generate(pipe)


def test_trained_weights_change_the_video_and_rows_stay_independent(pipe, folder):
    both = generate(enabled(pipe, folder))
    assert not torch.equal(both, generate(enabled(pipe, "lr")))
    enabled(pipe, folder)
    for row, prompt in enumerate(CALL["prompt"]):
        alone = generate(pipe, prompt=prompt, generator=seeded(row))
        assert float((both[row] - alone[0]).abs().max() / alone.abs().max()) <= 1e-5


def test_a_folder_an_instance_and_a_module_are_one(pipe, folder, branch):
    wanted = generate(enabled(pipe, folder))
    assert pipe.packforcing.stack.compressor == DualCompressor(folder)
    assert torch.equal(generate(enabled(pipe, DualCompressor(folder))), wanted)
    # Torch convolves with weights that may learn by another kernel, also without gradients.
    torch.testing.assert_close(generate(enabled(pipe, DualCompressor(branch))), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(enabled(pipe, DualCompressor(branch.requires_grad_(False)))), wanted)


def test_streaming_equals_whole(pipe, folder):
    enabled(pipe, HighResolutionCompressor(folder, project="direct"))
    whole = generate(pipe)
    assert torch.equal(torch.cat(list(pipe.packforcing.stream(generator=row_seeds(), **CALL)), dim=2), whole)


def test_copies_and_pickles_of_an_enabled_pipeline(pipe, folder):
    wanted = generate(enabled(pipe, folder))
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert other.packforcing.stack == pipe.packforcing.stack
        assert torch.equal(generate(other), wanted)


def test_a_stack_as_data_makes_the_same_video(pipe, folder):
    wanted = generate(enabled(pipe, folder))
    data = pipe.packforcing.stack.to_dict()
    assert torch.equal(generate(pipe.enable_packforcing(data)), wanted)


def test_wrong_weights_are_refused_before_anything_is_generated(pipe, tmp_path):
    other = HighResolutionBranch(channels=16, width=36, patch=(2, 2), base_model="other")
    for compressor in (DualCompressor(other), HighResolutionCompressor(other)):
        with pytest.raises(
            InvalidOptionError, match=r"made for other.*width=36.*this pipeline has channels=16, width=24"
        ):
            enabled(pipe, compressor)
    for compressor in (HighResolutionCompressor(str(tmp_path / "absent")), str(tmp_path / "absent")):
        with pytest.raises(InvalidOptionError, match="no compressor folder"):
            enabled(pipe, compressor)
    assert not hasattr(pipe, "packforcing")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("compressor", [LowResolutionCompressor, DualCompressor])
def test_direct_projection_is_the_first_layer_of_a_forward(compressor, fused, folder):
    """Its keys and values do not depend on the context; those of later layers do."""
    options = {"weights": folder} if compressor is DualCompressor else {}
    for layers in (1, 2):
        pipe = tiny_wan_pipeline(num_layers=layers)
        pipe.set_progress_bar_config(disable=True)
        if fused:
            pipe.transformer.fuse_qkv_projections()
        through, direct = (archive(enabled(pipe, compressor(**options, project=how))) for how in ("layers", "direct"))
        for a, b in zip(through[0], direct[0], strict=True):
            assert a.shape == (1, 2, 2, 12)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        if layers == 2:
            assert not any(torch.allclose(a, b, rtol=1e-2) for a, b in zip(through[1], direct[1], strict=True))


def test_direct_projection_sees_the_scale_of_a_lora(pipe, folder):
    from peft import LoraConfig

    pipe = tiny_wan_pipeline(num_layers=1)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_v"]))
    with torch.no_grad():
        for name, weight in pipe.transformer.named_parameters():
            if "lora" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    found = {
        (how, scale): archive(enabled(pipe, DualCompressor(folder, project=how)), attention_kwargs={"scale": scale})
        for how in ("layers", "direct")
        for scale in (0.5, 1.0)
    }
    for scale in (0.5, 1.0):
        for a, b in zip(found["layers", scale][0], found["direct", scale][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["direct", 0.5][0][0], found["direct", 1.0][0][0])


@pytest.mark.parametrize("chunk_frames", [2, 3])
def test_tokens_appended_in_the_commit_are_as_in_a_forward_of_their_own(chunk_frames, folder, monkeypatch):
    """With a sink that ends inside a chunk, two guidance branches, and rows whose choices differ."""
    found, forwards = [], []
    for rides in (True, False):
        pipe = tiny_wan_pipeline()
        pipe.set_progress_bar_config(disable=True)
        count = []
        pipe.transformer.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        monkeypatch.setattr(WanDenoiser, "appends_tokens", rides)
        enabled(pipe, DualCompressor(folder), chunk_frames=chunk_frames, sink_frames=chunk_frames + 1)
        seeds = [seeded(row) for row in range(2)]
        stream = pipe.packforcing.stream(**{**CALL, "guidance_scale": 2.0, "generator": seeds})
        video = torch.cat([next(stream) for _ in range(3)], dim=2)
        sessions = pipe.packforcing.sessions.values()
        blocks = [each for session in sessions for layer in range(2) for each in archived(session, layer)]
        assert blocks
        found.append([video, *sum(blocks, ())])
        stream.close()
        forwards.append(len(count))
    for appended, alone in zip(*found, strict=True):
        torch.testing.assert_close(appended, alone, rtol=1e-4, atol=1e-5)
    assert forwards[0] < forwards[1]


@pytest.mark.parametrize("project", ["layers", "direct"])
def test_a_bfloat16_model(project, folder):
    pipe = tiny_wan_pipeline().to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    enabled(pipe, HighResolutionCompressor(folder, project=project))
    assert torch.isfinite(generate(pipe, guidance_scale=2.0)).all()


@pytest.mark.parametrize("commit", ["rerun", "last-step"])
def test_sizes_that_are_no_multiples_of_the_chunk(commit, pipe, folder):
    compressor = HighResolutionCompressor(folder, project="direct")
    enabled(pipe, compressor, sink_frames=3, recent_frames=1, topk=2, commit=commit)
    frames = generate(pipe, num_frames=61)
    assert torch.isfinite(frames).all()
