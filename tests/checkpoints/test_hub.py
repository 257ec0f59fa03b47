"""Models by their Hub ids: from the local cache, or refused in one line."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from kvpack.checkpoints.config import Settings
from kvpack.checkpoints.hub import model_folder
from kvpack.cli import app
from kvpack.errors import InvalidOptionError
from kvpack.planning.presets import from_folder
from kvpack.testing import tiny_wan_pipeline, tiny_wan_transformer

NAME = "Acme/Tiny-Wan-Diffusers"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hub's cache with one repository, and no network."""
    snapshot = tmp_path / "hub/models--Acme--Tiny-Wan-Diffusers/snapshots/0123abcd"
    tiny_wan_pipeline().save_pretrained(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abcd")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_folder_goes_before_the_hub(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_folder(NAME) == cache
    shutil.copytree(cache, tmp_path / NAME)
    assert str(model_folder(NAME)) == NAME


def test_convert_takes_a_hub_id_as_its_base(cache, tmp_path):
    torch.save(tiny_wan_transformer().state_dict(), tmp_path / "model.pt")
    (cache / "transformer/diffusion_pytorch_model.safetensors").unlink()  # the base's own weights are not needed
    words = ["convert", tmp_path / "model.pt", "--base", NAME, "--output", tmp_path / "out", "--recipe", "self-forcing"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out/vae/config.json").read_bytes() == (cache / "vae/config.json").read_bytes()


def test_plan_takes_a_hub_id(cache):
    described = from_folder(NAME)
    assert (described.name, described.pipeline_class) == (NAME, "WanPipeline")
    result = CliRunner().invoke(app, ["plan", "--model", NAME, "--size", "32x32", "--json"])
    assert result.exit_code == 0, result.output


def test_generate_takes_a_hub_id_and_what_is_the_models_own(cache, tmp_path):
    Settings(fps=24.0, call={"num_inference_steps": 1, "max_sequence_length": 8}).write(cache)
    words = ["generate", "--model", NAME, "--prompt", "a red circle", "--seconds", "0.25", "--output", "a.mp4"]
    words[-1] = str(tmp_path / "a.mp4")
    result = CliRunner().invoke(app, [*words, "--height", "32", "--width", "32", "--json"])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert (made["fps"], made["frames"]) == (24.0, 5)
    absent = CliRunner().invoke(app, [word.replace(NAME, "Acme/Absent") for word in words])
    assert absent.exit_code == 1
    assert "not in the local cache and cannot be fetched offline" in absent.stderr
    assert len(absent.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["Acme/Absent", "models/absent"])
def test_a_hub_id_that_is_not_in_the_cache_says_so_offline(name, cache):
    with pytest.raises(InvalidOptionError, match=f"no base folder {name}, .* not in the local cache .* offline"):
        model_folder(name, "base")


@pytest.mark.parametrize("name", ["absent", "./absent", "/absent/model", "a/b/c", "owner/"])
def test_what_is_no_hub_id_is_a_folder_that_is_not_there(name):
    with pytest.raises(InvalidOptionError, match=f"no model folder {name}; give the folder of .*, or a Hub id"):
        model_folder(name)


def test_without_a_network_nothing_waits():
    """A name that nobody has, asked for as a user does; a resolver that is down and a switch are the same to them."""
    code = f"from kvpack.checkpoints.hub import model_folder; model_folder({'Acme/Absent'!r})"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (
        "InvalidOptionError: no model folder Acme/Absent, and the Hub's Acme/Absent is not in the local" in done.stderr
    )
