"""`kvpack generate` and `kvpack demo` write whole files, or one line about what is wrong and nothing else."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from helpers import command, complaint, forked
from kvpack.cli import demo
from kvpack.media import files, video
from kvpack.pipeline import track as generation
from kvpack.testing import tiny_wan_pipeline


def generate(model: Path, output: Path, *more: object) -> list[object]:
    small = ["--height", 64, "--width", 64, "--steps", 1, "--guidance-scale", 1, "--call", "max_sequence_length=8"]
    words = ["generate", "--model", model, "--prompt", "a red circle", "--seconds", 1.5, "--output", output]
    return [*words, *small, "--device", "cpu", *more]


@pytest.fixture
def nothing_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a model is even loaded."""

    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(generation, "load_pipeline", load)
    monkeypatch.setattr(demo, "load_pipeline", load)


def test_generate_writes_the_video_that_the_pipeline_makes(model: Path, tmp_path: Path) -> None:
    result = command(*generate(model, tmp_path / "a.mp4", "--stack", "packforcing", "-o", "topk=2", "--json"))
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["frames"], report["fps"], report["seed"]) == (21, 16, 0)
    assert (report["stack"]["selector"]["policy"], report["stack"]["selector"]["topk"]) == ("softmax-mass", 2)
    assert report["stats"]["chunks"] == 2
    assert report["stats"]["attended_bytes"] == 4 * 16 * 2 * 2 * 24 * 4
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert (container.streams.video[0].frames, container.streams.video[0].height) == (21, 64)


def test_generate_keeps_a_budget_and_says_what_it_chose(model: Path, tmp_path: Path) -> None:
    words = ["--stack", "self-forcing", "--budget-gb", "0.00004", "--seconds", 4]
    result = command(*generate(model, tmp_path / "a.mp4", *words, "--json"))
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["stats"]["resident_bytes"] == 36_864
    assert report["stack"]["partitioner"]["window_frames"] == 6
    assert report["budget"] == [
        "window_frames 9 -> 6: 5.53e-05 GB -> 3.686e-05 GB; windows are shorter",
        "self-forcing holds at most 3.686e-05 GB of 4e-05 GB",
    ]
    assert all(line in result.stderr for line in report["budget"])
    saved = command(*generate(model, tmp_path / "b.mp4", *words, "--checkpoint-every", 2, "--json"))
    assert json.loads(saved.stdout)["budget"] == report["budget"]
    refused = command(*generate(model, tmp_path / "c.mp4", "--budget-gb", "0.00001"))
    assert refused.exit_code == 1
    assert "the least that would do is budget_gb=" in refused.stderr


def test_the_same_seed_gives_the_same_file(model: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert command(*generate(model, tmp_path / f"{name}.mp4", "--seed", seed, "--stack", "full")).exit_code == 0
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_generate_shows_progress_and_figures(model: Path, tmp_path: Path) -> None:
    result = command(*generate(model, tmp_path / "a.mp4"))
    assert re.search(r"chunk\s+2/2", result.stderr)
    assert re.search(r"fps, KV 24.6 kB \+ 0 B", result.stderr)
    assert f"wrote {tmp_path / 'a.mp4'}" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "absent/a.mp4"], "cannot write absent/a.mp4: absent does not exist"),
        (["--output", "/"], "cannot write /: videos are mp4; give a name that ends in .mp4"),
        (["--stack", "fulll"], "no stack named 'fulll'; did you mean 'full'?"),
        (["--seconds", "0"], "seconds must be a number > 0, got 0"),
        (["--dtype", "int8"], "no dtype named 'int8'"),
        (["--call", "guidance"], "an option must be NAME=VALUE"),
    ],
)
@pytest.mark.usefixtures("nothing_generated")
def test_bad_input_is_found_before_the_model_is_loaded(model: Path, tmp_path: Path, words: list, message: str) -> None:
    assert message in complaint(*generate(model, tmp_path / "a.mp4", *words))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_generated")
def test_an_existing_directory_as_output(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()
    assert "a.mp4: it is a directory; give the name of a file in it" in complaint(*generate(model, tmp_path / "a.mp4"))


@pytest.mark.usefixtures("nothing_generated")
@pytest.mark.parametrize(
    ("trace", "message"),
    [("absent/t.jsonl", "absent does not exist; give a file in a directory that exists"), (".", "it is a directory")],
)
def test_a_trace_that_cannot_be_written(model: Path, tmp_path: Path, trace: str, message: str) -> None:
    assert message in complaint(*generate(model, tmp_path / "a.mp4", "--trace", tmp_path / trace))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "nowhere"], "no device 'nowhere' here"),
        (["--device", "cuda:99"], "no device 'cuda:99' here"),
        (["--height", "60"], "WanPipeline refuses the call: `height` and `width` have to be divisible by 16"),
        (["--call", "strength=1"], "WanPipeline refuses the call: got an unexpected keyword argument 'strength'"),
        (["--model", "absent"], "no model folder absent"),
    ],
)
def test_what_generate_cannot_do(model: Path, tmp_path: Path, words: list[str], message: str) -> None:
    assert message in complaint(*generate(model, tmp_path / "a.mp4", *words))
    assert list(tmp_path.iterdir()) == []


def test_folders_that_do_not_load(model: Path, tmp_path: Path) -> None:
    assert "has no model_index.json" in complaint(*generate(tmp_path, tmp_path / "a.mp4"))
    (tmp_path / "model_index.json").write_text("{")
    assert "does not load as a diffusers pipeline" in complaint(*generate(tmp_path, tmp_path / "a.mp4"))


def test_a_model_without_adapter(tmp_path: Path) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    unet = UNet2DModel(
        8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "ddim")
    message = complaint(*generate(tmp_path / "ddim", tmp_path / "a.mp4"))
    assert "kvpack has no adapter for UNet2DModel in DDIMPipeline" in message


def test_broken_weights_are_reported(model: Path, tmp_path: Path) -> None:
    pipe = tiny_wan_pipeline()
    pipe.transformer.proj_out.weight.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "model")
    assert "chunk 0 holds NaN or infinity" in complaint_after_progress(
        *generate(tmp_path / "model", tmp_path / "a.mp4")
    )
    assert not (tmp_path / "a.mp4").exists()


def complaint_after_progress(*words: object) -> str:
    result = command(*words)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert "Traceback" not in result.stderr
    return next(line for line in result.stderr.splitlines() if line.startswith("error: "))


def test_a_full_disk_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: files.PartialFile, data: bytes) -> int:
        self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise self.error

    monkeypatch.setattr(files.PartialFile, "write", write)
    message = complaint_after_progress(*generate(model, tmp_path / "a.mp4"))
    assert message.endswith("a.mp4: No space left on device; nothing of it was kept")
    words = ["demo", "--model", model, "--seconds", 1, "--steps", 1, "--output", tmp_path]
    assert "No space left on device" in complaint_after_progress(*words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
        MemoryError("4 bytes"),
    ],
    ids=lambda error: str(error)[:8],
)
def test_out_of_memory_is_one_line(
    error: Exception, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def next_frames(self: generation.Track) -> None:
        raise error

    monkeypatch.setattr(generation.Track, "next_frames", next_frames)
    message = complaint_after_progress(*generate(model, tmp_path / "a.mp4"))
    assert f"out of memory: {error}" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "said",
    ["a bug", "CUDA error: an illegal memory access was encountered", "required rank 4 tensor to use memory format"],
)
def test_a_bug_keeps_its_traceback(said: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def next_frames(self: generation.Track) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(generation.Track, "next_frames", next_frames)
    assert isinstance(command(*generate(model, tmp_path / "a.mp4")).exception, RuntimeError)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_exits_with_130_and_keeps_what_is_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = generation.Track.next_frames, []

    def next_frames(self: generation.Track) -> Any:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(generation.Track, "next_frames", next_frames)
    result = command(*generate(model, tmp_path / "a.mp4"))
    assert (result.exit_code, result.stdout) == (130, "")
    assert f"error: interrupted; {tmp_path / 'a.mp4'} holds the 0.8 s that were made" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_demo_compares_stacks(model: Path, tmp_path: Path) -> None:
    words = ["demo", "--model", model, "--seconds", 1, "--steps", 1, "--prompt", "a red circle", "--output", tmp_path]
    result = command(*words, "--compare", "full, packforcing", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [each["stack"]["name"] for each in report["stacks"]] == ["full", "packforcing"]
    assert json.loads((tmp_path / "demo.json").read_text()) == report
    table = command(*words)
    assert "0.8125 s of video" in table.stdout
    assert f"wrote {tmp_path}" in table.stdout.replace("\n", "")
    assert "--compare names no stack" in complaint(*words, "--compare", ",")


@pytest.mark.parametrize(
    ("signalled", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_from_outside_leaves_no_half_file(
    model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, signalled: int, code: int
) -> None:
    told = tmp_path_factory.mktemp("told") / "stderr"
    process = forked(*generate(model, tmp_path / "a.mp4", "--seconds", 3600), told=told)
    try:
        deadline = time.monotonic() + 120
        while not any(tmp_path.iterdir()) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.3)
        os.kill(process.pid, signalled)
        process.join(60)
    finally:
        process.kill()
    stderr = told.read_text()
    assert process.exitcode == code, stderr
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] in ([], ["a.mp4"])
    assert "error: interrupted; " in stderr


@pytest.mark.parametrize(("kind", "given"), [("png", 1), ("mp4", 5)])
def test_a_video_begins_with_a_file(model: Path, tmp_path: Path, kind: str, given: int) -> None:
    first, output = tmp_path / f"first.{kind}", tmp_path / "video.mp4"
    pictures = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
    if kind == "png":
        Image.fromarray(pictures[0]).save(first)
    else:
        with video.VideoWriter(first, 16) as writer:
            writer.write(pictures)
    result = command(*generate(model, output, "--begin", first, "--json"))
    assert result.exit_code == 0, result.output
    stats = json.loads(result.stdout)["stats"]
    assert stats["frames"] == (given + 3) // 4 + 4 * (stats["chunks"] - 1)
    assert "no picture or clip" in complaint(*generate(model, output, "--begin", tmp_path / "none.png"))
