"""What cannot be converted is refused in one line, and nothing is left behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import command
from kvpack.checkpoints import convert as converting
from kvpack.testing.pipelines import tiny_wan_transformer


@pytest.fixture(scope="module")
def weights():
    return tiny_wan_transformer().state_dict()


@pytest.fixture
def base(tmp_path):
    tiny_wan_transformer().save_config(tmp_path / "base")
    return tmp_path / "base"


def convert(source, base, output, *more):
    return command("convert", source, "--base", base, "--output", output, "--recipe", "krea-14b", *more)


@pytest.fixture
def complaint(tmp_path, base):
    """Converts, which must fail with one line and leave nothing."""

    def refused(source, *more, base=base):
        before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
        result = convert(source, base, tmp_path / "out", *more)
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        (line,) = result.stderr.strip().splitlines()
        assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
        return line.removeprefix("error: ")

    return refused


def saved(tmp_path, data):
    torch.save(data, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_an_unknown_layout_lists_keys(weights, complaint, tmp_path):
    other = dict(weights)
    for index, name in enumerate([*weights][:7]):
        other[f"strange.{index}"] = other.pop(name)
    message = complaint(saved(tmp_path, other))
    first = ", ".join([*weights][:5])
    assert f"7 missing keys, first {first}; 7 unexpected keys, first strange.0, " in message
    assert "strange.4" in message
    assert "strange.5" not in message


def test_one_missing_and_one_unexpected_are_told_apart(weights, complaint, tmp_path):
    fewer = {name: each for name, each in weights.items() if name != "proj_out.bias"}
    assert "1 missing keys, first proj_out.bias; 0 unexpected keys" in complaint(saved(tmp_path, fewer))
    more = {**weights, "img_emb.proj.1.weight": torch.ones(1)}
    assert "0 missing keys; 1 unexpected keys, first img_emb.proj.1.weight" in complaint(saved(tmp_path, more))


def test_another_size(weights, complaint, tmp_path):
    other = {**weights, "proj_out.bias": torch.ones(65)}
    assert complaint(saved(tmp_path, other)).startswith(
        "proj_out.bias is [65] in the checkpoint and [64] in the base's config; give the base of the same size"
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantised_weights(dtype, weights, complaint, tmp_path):
    other = {**weights, "proj_out.weight": weights["proj_out.weight"].to(dtype)}
    message = complaint(saved(tmp_path, {"generator": other}))
    assert "is quantised: 1 of its weights are not of 16 bits or more, e.g. proj_out.weight of " + str(dtype) in message


class Anything:
    """What a checkpoint of code rather than tensors holds."""


def test_files_that_are_no_checkpoints(weights, complaint, tmp_path):
    assert "no checkpoint" in complaint(tmp_path / "absent.pt")
    (tmp_path / "model.onnx").write_text("x")
    assert "model.onnx is none of .safetensors, .pt" in complaint(tmp_path / "model.onnx")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert "is no checkpoint" in complaint(tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    assert "text.safetensors is not a whole checkpoint" in complaint(tmp_path / "text.safetensors")
    save_file(weights, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-9])
    assert "cut.safetensors is not a whole checkpoint" in complaint(tmp_path / "cut.safetensors")
    whole = saved(tmp_path, weights).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    assert "cut.pt is no checkpoint, or not a whole one" in complaint(tmp_path / "cut.pt")
    assert "must hold weights by name, got a list" in complaint(saved(tmp_path, [torch.ones(1)]))


def test_code_in_a_checkpoint_is_never_run(weights, complaint, tmp_path):
    message = complaint(saved(tmp_path, {"generator": weights, "args": Anything()}))
    assert "holds more than tensors, e.g. a " in message
    assert ".Anything. Reading" in message
    assert "would run code from the file, which kvpack never does" in message


def test_checkpoints_without_weights(weights, complaint, tmp_path):
    assert "holds no tensors but optimizer, step; choose where with --weights KEY" in complaint(
        saved(tmp_path, {"optimizer": {"lr": 1.0}, "step": 3})
    )
    both = {"generator": weights, "critic": weights}
    assert "has no weights 'ema'; it holds generator, critic" in complaint(saved(tmp_path, both), "--weights", "ema")
    twice = {**weights, "module.proj_out.bias": weights["proj_out.bias"]}
    assert "has two weights for proj_out.bias, one of them module.proj_out.bias" in complaint(saved(tmp_path, twice))


def test_broken_folders_of_shards(weights, complaint, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    assert "no checkpoint in" in complaint(folder)
    for name in ("a", "b"):
        save_file(weights, folder / f"{name}.safetensors")
    assert "hold " in (message := complaint(folder))
    assert "name one file instead of the folder" in message
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "c.safetensors"}}))
    assert "names 1 files that are not there, e.g. c.safetensors" in complaint(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "is not the index of a sharded checkpoint" in complaint(folder)


def test_bases_that_are_none(weights, complaint, base, tmp_path):
    source = saved(tmp_path, weights)
    assert "no base folder" in complaint(source, base=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "has neither transformer/config.json nor config.json" in complaint(source, base=tmp_path / "empty")
    half = shutil.copytree(base, tmp_path / "half")
    (half / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]})
    )
    (half / "vae").mkdir(exist_ok=True)
    (half / "vae/config.json").write_text("{}")
    assert "vae holds a config and no weights; download the whole base" in complaint(source, base=half)
    (base / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 1536}))
    assert "the base's config is of a WanModel, not of a WanTransformer3DModel" in complaint(source)
    (base / "config.json").write_text("{")
    assert "config.json is not JSON" in complaint(source)
    (base / "model_index.json").write_text(json.dumps({"transformer_2": ["diffusers", "WanTransformer3DModel"]}))
    assert "has transformer_2 as well" in complaint(source)


def test_unknown_words(weights, complaint, tmp_path):
    source = saved(tmp_path, weights)
    assert "no recipe named 'krea'; did you mean 'krea-14b'? Installed: " in complaint(source, "--recipe", "krea")
    assert "no dtype named 'fp8'" in complaint(source, "--dtype", "fp8")


@pytest.mark.parametrize(("name", "told"), [("x", "none"), ("longlive-vs-krea", "none")])
def test_a_path_that_tells_no_recipe(name, told, weights, base, tmp_path):
    torch.save(weights, tmp_path / f"{name}.pt")
    words = ["convert", tmp_path / f"{name}.pt", "--base", base, "--output", tmp_path / "out"]
    result = command(*words)
    assert result.exit_code == 1
    assert f"tells {told}; give --recipe, one of self-forcing, " in result.stderr


def test_an_output_that_is_there(weights, base, complaint, tmp_path):
    source = saved(tmp_path, weights)
    output = tmp_path / "out"
    output.mkdir()
    assert convert(source, base, output).exit_code == 0  # empty, so nothing is lost
    assert "is not empty; give another folder or --overwrite" in complaint(source)
    (output / "mine.txt").write_text("x")
    assert convert(source, base, output, "--overwrite").exit_code == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "kvpack_config.json",
        "model_index.json",
        "scheduler",
        "transformer",
    ]
    shutil.rmtree(output)
    output.write_text("x")
    assert "out is a file; give a folder" in complaint(source)


def test_an_output_that_is_read(weights, complaint, base, tmp_path):
    source = saved(tmp_path, weights)
    result = convert(source, base, tmp_path, "--overwrite")
    assert result.exit_code == 1
    assert "which is read; give another folder" in result.stderr
    assert "which is read; give another folder" in convert(source, base, base, "--overwrite").stderr


@pytest.mark.parametrize("there", [True, False], ids=["overwriting", "new"])
def test_all_or_nothing(there, weights, base, tmp_path, monkeypatch):
    source, output = saved(tmp_path, weights), tmp_path / "out"
    if there:
        assert convert(source, base, output).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(converting, "_copy_parts", full)  # the last step, when the transformer is written
    result = convert(source, base, output, "--overwrite")
    assert result.exit_code == 1
    assert "no space left on device" in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert output.exists() == there


def test_what_was_there_comes_back_if_the_last_step_fails(weights, base, tmp_path, monkeypatch):
    source, output = saved(tmp_path, weights), tmp_path / "out"
    assert convert(source, base, output).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    rename = Path.rename

    def refused(path, target):
        if path.name == "new":
            raise OSError("cannot be renamed")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    assert "cannot be renamed" in convert(source, base, output, "--overwrite").stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_source_is_not_changed(weights, base, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    assert convert(tmp_path / "model.safetensors", base, tmp_path / "out", "--dtype", "bfloat16").exit_code == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")["proj_out.bias"].dtype == (
        torch.bfloat16
    )
