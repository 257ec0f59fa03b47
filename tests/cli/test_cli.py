"""The command line: what it prints, and one line for whatever is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvpack
from helpers import command, complaint
from kvpack.cli import support as cli_support
from kvpack.plugins.registry import registry

REFERENCE = ["plan", "--preset", "wan2.1-t2v-1.3b", "--size", "832x480", "--seconds", "120", "--stack", "packforcing"]


def test_plan_prints_one_json_object_with_the_figures_of_the_paper() -> None:
    result = command(*REFERENCE, "--dtype", "bfloat16", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    plan = json.loads(result.stdout)
    assert plan["attended_tokens"] == 27_872
    assert plan["attended_kv_bytes"] == 3_987_210_240
    assert plan["archive_kv_bytes"] == 117 * 182 * 184_320
    assert plan["full_tokens"] == 748_800
    assert plan["full_kv_bytes"] == 748_800 * 184_320
    assert plan["pixel_frames"] == 1917
    assert plan["flops_per_chunk"] > 1e14


def test_plan_for_a_reader() -> None:
    result = command(*REFERENCE)
    assert result.exit_code == 0
    for figure in ("27,872 tokens", "3,987,210,240 B", "748,800 tokens", "138 GB"):
        assert figure in result.stdout


def test_plan_options_reach_the_stack_and_the_model() -> None:
    def plan(*more: object) -> dict[str, Any]:
        return json.loads(command(*REFERENCE, "--json", *more).stdout)

    assert plan("-o", "topk=8", "-o", "compressor=pool")["attended_tokens"] == 27_872 - 8 * 182
    assert plan("--option", "archive_blocks=20")["archive_blocks"] == 20
    assert plan("--dtype", "float32")["attended_kv_bytes"] == 2 * 3_987_210_240
    assert plan("--guidance", "--batch", 3)["attended_kv_bytes"] == 6 * 3_987_210_240
    assert plan("--stack", "full")["attended_tokens"] == 748_800
    assert plan("--steps", 9)["flops_per_chunk"] == 2 * plan()["flops_per_chunk"]


def test_plan_for_a_folder_without_weights(model: Path, tmp_path: Path) -> None:
    for part in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text((model / part).read_text())
    result = command("plan", "--model", tmp_path, "--size", "64x64", "--seconds", 5, "--dtype", "float32", "--json")
    assert json.loads(result.stdout)["kv_bytes_per_token"] == 2 * 2 * 24 * 4


def test_plan_has_the_guidance_of_the_models_own_call(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    words = ["plan", "--model", folder, "--size", "64x64", "--seconds", 5, "--json"]

    def held(scale: float | None, *more: object) -> int:
        call = {} if scale is None else {"guidance_scale": scale}
        (folder / "kvpack_config.json").write_text(json.dumps({"stack": {"name": "packforcing"}, "call": call}))
        return json.loads(command(*words, *more).stdout)["resident_kv_bytes"]

    one = held(1.0)
    assert held(3.0) == held(None) == held(1.0, "--guidance") == 2 * one  # a stock pipeline's own scale is 5
    assert held(3.0, "--no-guidance") == one


@pytest.mark.parametrize("preset", ["wan2.1-t2v-1.3b", "self-forcing-1.3b"])
def test_plan_says_for_how_many_branches_it_counts(preset: str) -> None:
    """Of a preset one, though the stock pipeline is guided: causal checkpoints are not."""
    words = ["plan", "--preset", preset, "--seconds", 5]
    for branches, other, more in ((1, "--guidance counts 2", []), (2, "--no-guidance counts 1", ["--guidance"])):
        table = command(*words, *more).stdout.replace("│", " ").split()
        assert f"guidance branches {branches}; {other} chunks" in " ".join(table)
        assert json.loads(command(*words, *more, "--json").stdout)["branches"] == branches


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --preset or --model, got neither; presets: wan2.1-t2v-1.3b, "),
        (["--preset", "wan2.1-t2v-1.3b", "--model", "x"], "got both"),
        (["--preset", "wan2.1"], "no preset named 'wan2.1'; did you mean 'wan2.1-t2v-"),
        (["--model", "absent"], "no model folder absent; give the folder of a whole diffusers pipeline"),
        (["--size", "832"], "size must be WIDTHxHEIGHT in pixels, e.g. 832x480, got '832'"),
        (["--size", "0x0"], "height and width must be multiples of 16 and 16 for this model, got 0x0"),
        (["--size", "833x480"], "height and width must be multiples of 16 and 16 for this model, got 480x833"),
        (["--seconds", "-2"], "seconds must be a number > 0, got -2"),
        (["--seconds", "inf"], "seconds must be a number > 0, got inf"),
        (
            ["--stack", "pack-forcing"],
            "no stack named 'pack-forcing'; did you mean 'packforcing'? Installed: deep-",
        ),
        (["-o", "top_k=8"], "no option of stack packforcing named 'top_k'; did you mean 'topk'?"),
        (["-o", "topk"], "an option must be NAME=VALUE, e.g. topk=8, got 'topk'"),
        (["-o", "topk=-1"], "topk must be >= 0, got -1"),
        (["-o", "topk=1", "-o", "topk=2"], "option topk was given twice"),
        (["-o", "compressor=zip"], "no compressor named 'zip'"),
        (["-o", "sink_frames=1", "-o", "recent_frames=1"], "must be at least chunk_frames 4, got 1 + 1"),
        (["--dtype", "bfloat"], "no dtype named 'bfloat'; did you mean 'bfloat16'?"),
        (["--fps", "0"], "fps must be a number > 0, got 0"),
        (["--gpu-memory", "inf"], "--gpu-memory must be a number above 0 GiB, e.g. 24, got inf"),
    ],
)
def test_what_plan_cannot_do(words: list[str], message: str) -> None:
    preset = [] if {"--preset", "--model"} & set(words) or not words else ["--preset", "wan2.1-t2v-1.3b"]
    assert message in complaint("plan", *preset, *words)


@pytest.mark.parametrize("words", [["plan", "--second", "5"], ["plan", "--seconds", "five"], ["demos"], ["generate"]])
def test_misspelt_commands_exit_with_2(words: list[str]) -> None:
    result = command(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize("option", ["--batch", "--steps"])
@pytest.mark.parametrize("more", [["--stack", "h2o"], ["--training"]], ids=str)
def test_nothing_cannot_be_planned(option: str, more: list[str]) -> None:
    for count in ("0", "-1"):
        result = command("plan", "--preset", "wan2.1-t2v-1.3b", option, count, *more)
        assert result.exit_code == 2
        assert f"Invalid value for '{option}'" in result.stderr


def test_policies_lists_everything_with_its_package() -> None:
    result = command("policies", "--json")
    rows = json.loads(result.stdout)["policies"]
    assert {(row["role"], row["name"]) for row in rows} == set(registry().origins)
    assert all(row["summary"] for row in rows if row["role"] != "adapter")
    assert {"role": "selector", "name": "topk"}.items() <= next(row for row in rows if row["name"] == "topk").items()
    assert {row["package"] for row in rows if row["name"] in ("topk", "wan", "full")} == {"kvpack"}
    table = command("policies")
    assert table.exit_code == 0
    assert all(row["name"] in table.stdout for row in rows)


def test_help_names_every_option() -> None:
    for words in (["--help"], ["demo", "--help"], ["generate", "--help"], ["plan", "--help"], ["policies", "--help"]):
        result = command(*words)
        assert result.exit_code == 0
        assert "--help" in result.stdout
    assert command("--version").stdout.strip() == kvpack.__version__


def test_sizes_for_readers() -> None:
    sizes = {
        0: "0 B",
        999: "999 B",
        1000: "1 kB",
        999_600: "1 MB",
        3_987_210_240: "3.99 GB",
        2e17: "200 PB",
        2e18: "2e+03 PB",
    }
    assert {count: cli_support.size_text(count) for count in sizes} == sizes


def test_the_command_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvpack", *REFERENCE, "--json"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["attended_tokens"] == 27_872
