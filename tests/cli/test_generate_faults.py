"""Whatever `kvpack generate` is given is used, or refused in one line; the model's own frame rate and size hold."""

import json
import os
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from diffusers import (
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
)
from PIL import Image
from typer.testing import CliRunner

import helpers
from helpers import forked
from kvpack.cli import app
from kvpack.media.video import VideoWriter
from kvpack.pipeline import track
from kvpack.shipped import CALL, FPS, shipped_folder
from kvpack.testing import tiny_anyflow_far_pipeline, tiny_skyreels_v2_pipeline, tiny_wan_pipeline

SMALL = ["--height", 32, "--width", 32, "--steps", 1, "--device", "cpu", "--call", "max_sequence_length=8"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {
        "wan": tiny_wan_pipeline(),
        "far": tiny_anyflow_far_pipeline(),
        "sky": tiny_skyreels_v2_pipeline(pipeline_class=SkyReelsV2DiffusionForcingPipeline),
        "sky-i2v": tiny_skyreels_v2_pipeline(pipeline_class=SkyReelsV2DiffusionForcingImageToVideoPipeline),
        "sky-v2v": tiny_skyreels_v2_pipeline(pipeline_class=SkyReelsV2DiffusionForcingVideoToVideoPipeline),
    }
    for name, pipe in made.items():
        pipe.save_pretrained(folder / name)
    return folder


@pytest.fixture
def files(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 32, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    with VideoWriter(tmp_path / "c.mp4", 24) as writer:
        writer.write(np.random.default_rng(0).integers(0, 255, (14, 48, 32, 3), dtype=np.uint8))
    return tmp_path


def run(model, output, *more, seconds=1.0, prompt="a red circle", small=SMALL):
    words = ["generate", "--model", model, "--prompt", prompt, "--seconds", seconds, "--output", output]
    return CliRunner().invoke(app, [str(word) for word in [*words, *small, *more]])


def complaint(*words, **named):
    result = run(*words, **named)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    (line,) = result.stderr.strip().splitlines()
    return line


def made(*words, **named):
    result = run(*words, "--json", **named)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(("model", "fps"), [("wan", 16), ("sky", 24), ("far", 16)])
def test_seconds_and_files_are_at_the_familys_frame_rate(model, fps, models, tmp_path):
    report = made(models / model, tmp_path / "a.mp4", "--guidance-scale", 1)
    assert (report["fps"], report["frames"]) == (fps, fps - 3)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == fps


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("wan", "p.png"),
        ("wan", "c.mp4"),
        ("far", "p.png"),
        ("far", "c.mp4"),
        ("sky-i2v", "p.png"),
        ("sky-v2v", "c.mp4"),
    ],
)
def test_every_family_begins_with_what_it_can(model, file, models, files):
    report = made(models / model, files / "a.mp4", "--begin", files / file, "--guidance-scale", 1, seconds=2)
    assert report["stats"]["frames"] > 4


@pytest.mark.parametrize(
    ("model", "file", "words"),
    [
        ("sky-i2v", "c.mp4", "this pipeline begins with a picture, but --begin"),
        ("sky", "p.png", "this pipeline begins with neither a picture nor a clip, but --begin"),
        ("wan", "none.png", "no picture or clip"),
    ],
)
def test_what_a_family_cannot_begin_with_is_told(model, file, words, models, files):
    assert words in complaint(models / model, files / "a.mp4", "--begin", files / file)
    assert not (files / "a.mp4").exists()


@pytest.mark.parametrize(("model", "kind"), [("sky-i2v", "picture"), ("sky-v2v", "clip")])
def test_a_family_that_must_begin_with_something_says_so_before_it_is_loaded(model, kind, models, files, monkeypatch):
    monkeypatch.setattr(track, "load_pipeline", None)
    line = f"error: this pipeline begins with a {kind}; give 'kvpack generate' one by --begin FILE"
    assert complaint(models / model, files / "a.mp4") == line
    (files / "p.jsonl").write_text('{"prompt": "a"}')
    words = ["batch", files / "p.jsonl", "--model", models / model, "--seconds", 1, "--output", files / "out"]
    assert helpers.complaint(*words, "--device", "cpu") == line


@pytest.mark.parametrize("model", ["wan", "far", "sky-i2v"])
def test_a_picture_that_is_the_whole_video_is_told_in_seconds(model, models, files):
    line = complaint(models / model, files / "a.mp4", "--begin", files / "p.png", seconds=0.1)
    assert line.endswith(
        "is one frame and the whole video too, so that nothing is left to generate; give more --seconds"
    )


def test_a_clip_longer_than_the_video_is_told_in_seconds(models, files):
    line = complaint(models / "wan", files / "a.mp4", "--begin", files / "c.mp4", seconds=0.5)
    assert "c.mp4 lasts 0.625 s (10 frames at 16 a second) and the whole video 0.312 s (5 frames)" in line
    assert "nothing is left to generate; give more --seconds" in line


@pytest.mark.parametrize(
    "prompt", ['[(0, "a red circle"), (2, "the blue square")]', '[[0, "a red circle"], [2, "the"]]']
)
def test_a_schedule_is_a_schedule(prompt, models, tmp_path, monkeypatch):
    # Before the encoder, whose every frame depends on those behind it.
    written, write = [], VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda writer, frames: (written.append(frames), write(writer, frames)))
    small = ["--guidance-scale", 1, "--json", "--seconds", 4]
    made(models / "wan", tmp_path / "one.mp4", *small)
    one, written[:] = np.concatenate(written), []
    made(models / "wan", tmp_path / "two.mp4", *small, prompt=prompt)
    two = np.concatenate(written)
    assert np.array_equal(one[:29], two[:29])
    assert not np.array_equal(one[29], two[29])
    assert "--prompt is a schedule if it begins so" in complaint(models / "wan", tmp_path / "a.mp4", prompt='[(0, "a"')


def frames(path):
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--call", "output_type=latent"],
            "--call output_type cannot be given here, for frames are written to --output",
        ),
        (["--call", "num_videos_per_prompt=2"], "--call num_videos_per_prompt cannot be given here, for one video is"),
        (["--call", "num_frames=9"], "--seconds says how long"),
        (["--call", "generator=3"], "--seed says"),
        (["--call", "height=64"], "height was given twice"),
        (["--fps", "nan"], "fps must be a number > 0, got nan"),
        (["--fps", "inf"], "fps must be a number > 0, got inf"),
        (["--seed", 2**64], "seed must be a whole number between -2^63 and 2^64 - 1, got 18446744073709551616"),
        (
            ["--negative-prompt", "green", "--guidance-scale", 1],
            "a negative prompt needs guidance, but guidance_scale is 1",
        ),
        (["--device", "meta"], "no device 'meta' here"),
        (
            ["--prompt", '[(0, ["a", "b"])]'],
            """one video is written, so that each prompt of a schedule is one text, got [(0, ["a", "b"])]""",
        ),
        (["--call", "decode_device=cpu", "--checkpoint-every", 1], "--call decode_device does not go with checkpoints"),
    ],
)
def test_what_cannot_be_used_is_refused(more, words, models, tmp_path):
    assert words in complaint(models / "wan", tmp_path / "a.mp4", *more)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_is_another_file_than_the_video(models, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.mp4")
    for name in ("a.mp4", "link.jsonl"):
        line = complaint(models / "wan", tmp_path / "a.mp4", "--trace", tmp_path / name)
        assert line == f"error: --trace and --output are one file, {tmp_path / 'a.mp4'}; give the trace another name"
    assert not (tmp_path / "a.mp4").exists()


def test_a_negative_prompt_is_used(models, tmp_path):
    for name, more in (("one", []), ("two", ["--negative-prompt", "the green square"])):
        made(models / "wan", tmp_path / f"{name}.mp4", "--guidance-scale", 5, *more)
    assert (tmp_path / "one.mp4").read_bytes() != (tmp_path / "two.mp4").read_bytes()


def test_the_shipped_model_says_its_own_size(tmp_path):
    report = made(shipped_folder(), tmp_path / "a.mp4", "--device", "cpu", small=[])
    assert (report["fps"], report["frames"]) == (FPS, 13)
    assert next(frames(tmp_path / "a.mp4")).shape == (CALL["height"], CALL["width"], 3)


@pytest.mark.parametrize("signalled", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["generate", "demo"])
def test_a_signal_completes_the_file(command, signalled, tmp_path, tmp_path_factory):
    told = tmp_path_factory.mktemp("told") / "stderr"
    words = {
        "generate": ["--model", shipped_folder(), "--prompt", "a", "--output", tmp_path / "demo.mp4", "--steps", 1],
        "demo": ["--output", tmp_path, "--steps", 1],
    }[command]
    process = forked(command, "--seconds", 3600, *words, told=told)
    try:
        deadline = time.monotonic() + 120
        while not any(each.stat().st_size > 20_000 for each in tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, signalled)
        process.join(60)
    finally:
        process.kill()
    assert process.exitcode == 128 + signalled
    count = sum(1 for _ in frames(tmp_path / "demo.mp4"))
    assert [each.name for each in tmp_path.iterdir()] == ["demo.mp4"]
    assert (
        f"error: interrupted; {tmp_path / 'demo.mp4'} holds the {count / 16:.1f} s that were made" in told.read_text()
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["generate", "--model", "none", "--prompt", "a", "--seconds", 1, "--output", "a.mp4"],
        ["plan", "--model", "none"],
        ["convert", "none", "--base", "none", "--output", "none"],
        ["train-compressor", "--model", "none", "--data", "none", "--output", "none"],
        ["evaluate", "none.mp4"],
        ["demo", "--output", "/proc/none"],
    ],
    ids=lambda words: words[0],
)
def test_help_and_wrong_paths_do_not_wait_for_torch(words):
    code = "import sys; from kvpack.cli import app; from typer.testing import CliRunner; "
    code += (
        f"r = CliRunner().invoke(app, {[str(word) for word in words]!r}); print(r.exit_code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{int(words != ['--help'])} False"


@pytest.mark.parametrize(
    "code",
    [
        "import kvpack; from diffusers import WanPipeline as P",
        "from diffusers import WanPipeline as P; import kvpack",
        "import kvpack.pipeline.enable; from diffusers import WanPipeline as P",
        "import kvpack, diffusers; P = diffusers.DiffusionPipeline",
    ],
)
def test_the_two_methods_are_there_whatever_is_imported_first(code, python):
    """And nothing else of the process is changed."""
    code = f"import sys; assert not {{'kvpack', 'diffusers'}} & set(sys.modules); {code}"
    code += "; assert P.enable_packforcing is kvpack.enable and P.disable_packforcing is kvpack.disable"
    code += "; assert not [f for f in sys.meta_path if type(f).__module__ == 'kvpack']"
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_import_does_not_wait_for_torch():
    code = "import sys, kvpack; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules); print(kvpack.Session)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
