"""What people's checkpoints hold and how they are named, each with what must come of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from safetensors.torch import save_file
from typer.testing import CliRunner

from kvpack.checkpoints.config import Settings
from kvpack.checkpoints.reading import read_checkpoint
from kvpack.checkpoints.recipes import recipe_for
from kvpack.cli import app
from kvpack.errors import InvalidOptionError
from kvpack.planning.presets import from_folder
from kvpack.testing import tiny_skyreels_v2_pipeline, tiny_wan_pipeline, tiny_wan_transformer

BESIDE = {
    "step_counter": torch.tensor(7),
    "causal_mask": torch.ones(4, 4, dtype=torch.bool),
    "freqs": torch.ones(8, 4, dtype=torch.complex64),
    "blocks.0.position_ids": torch.arange(16, dtype=torch.int32),
    "blocks.0.norm.num_batches_tracked": torch.tensor(3),
    "attention_bias": torch.ones(4, dtype=torch.uint8),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_wan_pipeline().save_pretrained(folder)
    return folder


def convert(source, base, output, *more):
    words = ["convert", source, "--base", base, "--output", output, *more]
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("name", BESIDE)
def test_integers_masks_and_tables_beside_weights_are_no_weights(name, base, tmp_path):
    weights = tiny_wan_transformer().state_dict()
    torch.save({**weights, name: BESIDE[name]}, tmp_path / "model.pt")
    result = convert(tmp_path / "model.pt", base, tmp_path / "out", "--recipe", "self-forcing", "--json")
    assert result.exit_code == 0, result.output
    assert f'"tensors": {len(weights)}' in result.stdout


@pytest.mark.parametrize("name", ["blocks.0.attn1.to_q.weight", "ffn.0.qweight", "ffn.0.weight_packed", "ffn.0.bias"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_weights_of_whole_numbers_are_quantised(name, dtype, tmp_path):
    save_file({name: torch.ones(4, 4, dtype=dtype), "ffn.0.scale": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidOptionError, match=f"is quantised: 1 of its weights .* {name} of {dtype}"):
        read_checkpoint(tmp_path / "model.safetensors")


KNOWN = {
    "Self-Forcing/checkpoints/self_forcing_dmd.pt": "self-forcing",
    "checkpoints/chunkwise/causal_forcing.pt": "causal-forcing-chunkwise",
    "checkpoints/causal-forcing++/framewise-2step.pt": "causal-forcing-framewise-2step",
    "checkpoints/causal-forcing++/framewise-1step.pt": "causal-forcing-framewise-1step",
    "models--zhuhz22--Causal-Forcing/snapshots/13cdc9b9/causal-forcing++/framewise-1step.pt": (
        "causal-forcing-framewise-1step"
    ),
    "CausVid/autoregressive_checkpoint": "causvid",
    "models--tianweiy--CausVid/snapshots/13cdc9b9/autoregressive_checkpoint/model.pt": "causvid",
    "LongLive/models/longlive_base.pt": "longlive",
    "LongLive-2.0-5B/model_bf16.pt": "longlive-2-5b",
    "models--Efficient-Large-Model--LongLive-2.0-5B/snapshots/8521079b/model_bf16.pt": "longlive-2-5b",
}


@pytest.mark.parametrize("path", KNOWN)
def test_a_released_file_tells_its_recipe(path, tmp_path):
    assert recipe_for(tmp_path / path, None).name == KNOWN[path]


ASKED = {
    "CausVid/wan_causal_ode_checkpoint_model_003000/model.pt": "CausVid's initialisation, which was not distilled",
    "CausVid/wan_ode_checkpoint/model.pt": "CausVid's initialisation",
    "Causal-Forcing/chunkwise/ar_diffusion.pt": "a teacher of many steps and guidance",
    "Causal-Forcing/framewise/ar_diffusion.pt": "a teacher of many steps and guidance",
    "Causal-Forcing/chunkwise/longvideo.pt": "Causal-Forcing's long-video weights",
    "Causal-Forcing/framewise/causal_ode.pt": "an initialisation of Causal-Forcing",
    "Causal-Forcing/chunkwise/causal_cd.pt": "an initialisation of Causal-Forcing",
    "Self-Forcing/checkpoints/ode_init.pt": "an initialisation from ODE pairs",
    "Self-Forcing/checkpoints/self_forcing_sid.pt": "none",
    "LongLive-2.0-5B-NVFP4-S4/model_4o6.pt": "none",
    "LongLive-RAG/model.pt": "none",
    "longlive_models/models/lora.pt": "none",
    "krea-vs-self-forcing/model.pt": "none",
    "CausVid/model.pt": "none",
    "causal-forcing-framewise-experiments/step-2000.pt": "none",
}


@pytest.mark.parametrize("path", ASKED)
def test_another_file_of_the_same_repository_asks_for_a_recipe(path, tmp_path):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).touch()
    with pytest.raises(InvalidOptionError, match=f"tells {ASKED[path]}.*; give --recipe, one of self-forcing, "):
        recipe_for(tmp_path / path, None)
    assert recipe_for(tmp_path / path, "self-forcing").name == "self-forcing"


@pytest.mark.parametrize(
    "path",
    [
        "CausVid/bidirectional_checkpoint1/model.pt",
        "CausVid/bidirectional_checkpoint2/model.pt",
        "CausVid/bidirectional_checkpoint2",
        "models--tianweiy--CausVid/snapshots/13cdc9b9/bidirectional_checkpoint2/model.pt",
        "wan_models/Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors",
        "Wan2.1-T2V-14B-Diffusers/transformer/diffusion_pytorch_model-00001-of-00012.safetensors",
        "Wan2.2-TI2V-5B/diffusion_pytorch_model-00001-of-00003.safetensors",
    ],
)
def test_weights_that_are_not_causal_are_refused(path, tmp_path):
    for recipe in (None, "self-forcing"):
        with pytest.raises(InvalidOptionError, match=r"is not causal: .*; give a checkpoint that was, or --causal"):
            recipe_for(tmp_path / path, recipe)
    assert recipe_for(tmp_path / path, "self-forcing", causal=True).name == "self-forcing"


def test_stock_weights_are_converted_where_somebody_knows_better(base, tmp_path):
    source = tmp_path / "Wan2.1-T2V-1.3B-Diffusers/transformer/diffusion_pytorch_model.safetensors"
    source.parent.mkdir(parents=True)
    save_file(tiny_wan_transformer().state_dict(), source)
    asked = source, base, tmp_path / "out", "--recipe", "self-forcing"
    refused = convert(*asked)
    assert refused.exit_code == 1
    assert "is not causal: Wan's own weights" in refused.output
    assert not (tmp_path / "out").exists()
    assert convert(*asked, "--causal").exit_code == 0


@pytest.mark.parametrize(
    ("worst", "more", "told"),
    [
        (float("nan"), (), "hold NaN or infinity, first proj_out.weight: it is broken; give another"),
        (float("-inf"), (), "hold NaN or infinity"),
        (1e6, ("--dtype", "float16"), "it is broken, or torch.float16 is too small for it"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(worst, more, told, dtype, base, tmp_path):
    weights = {name: each.to(dtype) for name, each in tiny_wan_transformer().state_dict().items()}
    weights["proj_out.weight"][0, 0] = worst
    save_file(weights, tmp_path / "model.safetensors")
    refused = convert(tmp_path / "model.safetensors", base, tmp_path / "out", "--recipe", "self-forcing", *more)
    assert refused.exit_code == 1
    assert told in " ".join(refused.output.split())
    assert not (tmp_path / "out").exists()


def test_a_causal_model_with_wan_in_its_name_is_not_taken_for_wan(tmp_path):
    for name in ("Wan2.1-T2V-1.3B-Self-Forcing", "Wan2.1-T2V-1.3B-causal", "my-wan"):
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "transformer/diffusion_pytorch_model.safetensors").touch()
        with pytest.raises(InvalidOptionError, match="tells none; give --recipe"):
            recipe_for(tmp_path / name / "transformer/diffusion_pytorch_model.safetensors", None)


def test_longlive_2_as_its_own_config_says(base, tmp_path):
    folder = tmp_path / "LongLive-2.0-5B"
    folder.mkdir()
    weights = tiny_wan_transformer().state_dict()
    torch.save({"generator": {f"model.{name}": each for name, each in weights.items()}}, folder / "model_bf16.pt")
    assert convert(folder / "model_bf16.pt", base, tmp_path / "out").exit_code == 0
    settings = json.loads((tmp_path / "out/kvpack_config.json").read_text())
    assert (settings["recipe"], settings["fps"]) == ("longlive-2-5b", 24.0)
    assert settings["stack"]["options"] == {
        "chunk_frames": 8,
        "window_frames": 32,
        "sink_frames": 8,
        "global_sink": True,
    }
    assert settings["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    pipe = WanPipeline.from_pretrained(tmp_path / "out").enable_packforcing()
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler)
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == pytest.approx([999, 937, 833, 624], abs=1)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "max_sequence_length": 16, "output_type": "latent"}
    assert pipe("a red circle", num_frames=93, **call).frames.shape[2] == 24
    assert (pipe.packforcing.fps, pipe.packforcing.stack.name) == (24.0, "longlive")


RATES = {
    "wan2.1-t2v-1.3b": 16,
    "wan2.1-t2v-14b": 16,
    "wan2.2-ti2v-5b": 24,
    "skyreels-v2-df-1.3b": 24,
    "skyreels-v2-df-14b": 24,
    "anyflow-far-1.3b": 16,
    "longlive-1.3b": 16,
    "longlive-2-5b": 24,
}


@pytest.mark.parametrize("preset", RATES)
def test_a_second_is_the_models_own(preset):
    words = ["plan", "--json", "--preset", preset, "--seconds", "10"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["pixel_frames"] == (RATES[preset] * 10 - 1) // 4 * 4 + 1
    asked = CliRunner().invoke(app, [*words, "--fps", "30"])
    assert json.loads(asked.stdout)["pixel_frames"] == 297


def test_a_folder_has_its_familys_frame_rate(tmp_path):
    for name, pipe, rate in (
        ("wan", tiny_wan_pipeline(), 16.0),
        ("skyreels", tiny_skyreels_v2_pipeline(), 24.0),
    ):
        pipe.save_pretrained(tmp_path / name)
        assert from_folder(tmp_path / name).settings.fps == rate
        assert pipe.enable_packforcing().packforcing.fps == rate
    Settings(fps=12.0).write(tmp_path / "skyreels")
    assert from_folder(tmp_path / "skyreels").settings.fps == 12.0
    config = Path(tmp_path / "wan/transformer/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 48}))
    assert from_folder(tmp_path / "wan").settings.fps == 24.0


@pytest.mark.parametrize("words", [[], ["--recipe", "self-forcing"]])
@pytest.mark.parametrize("name", ["nope.pt", "CausVid/nope", "self_forcing_dmd.pt"])
def test_a_missing_checkpoint_is_missing(name, words, base, tmp_path):
    result = convert(tmp_path / name, base, tmp_path / "out", *words)
    assert result.exit_code == 1
    assert f"no checkpoint {tmp_path / name}; give a file or a folder of shards" in " ".join(result.stderr.split())


@pytest.mark.parametrize("name", ["WanImageToVideoPipeline", "WanVACEPipeline", "StableDiffusionPipeline", None])
def test_a_base_that_no_converted_model_runs_in_is_refused(name, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    (tmp_path / "base/model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    torch.save(tiny_wan_transformer().state_dict(), tmp_path / "model.pt")
    result = convert(tmp_path / "model.pt", tmp_path / "base", tmp_path / "out", "--recipe", "self-forcing")
    assert result.exit_code == 1
    assert f"is a {name}, but what is converted is run by a WanPipeline" in result.stderr
    assert not (tmp_path / "out").exists()
