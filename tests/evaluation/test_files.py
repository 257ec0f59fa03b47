"""`kvpack evaluate`: any video file, VBench where it is installed, and one line for whatever is wrong."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import helpers
from benchmarks.toyworld import world
from benchmarks.toyworld.facts import facts_of
from helpers import command
from kvpack.errors import InvalidOptionError, OutputError
from kvpack.evaluation import METRICS, Facts, Observer, drift, general_measures, measures, vbench
from kvpack.evaluation.measures import GENERAL
from kvpack.media.reading import opened
from kvpack.media.video import VideoWriter


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    with VideoWriter(path, 16) as writer:
        writer.write(world.make_clip(world.HELD_OUT[0], 0, 48, world.PLAIN).video)
    return path


run = partial(command, "evaluate")


complaint = partial(helpers.complaint, "evaluate")


def test_a_file_is_read_in_pieces(video: Path) -> None:
    with opened(video) as file:
        assert file.fps == 16
        pieces = list(file.frames)
    assert [len(piece) for piece in pieces] == [16, 16, 16]
    difference = np.concatenate(pieces).astype(int) - world.make_clip(world.HELD_OUT[0], 0, 48, world.PLAIN).video
    assert np.abs(difference).mean() < 12


def test_measures_of_files(video: Path) -> None:
    result = run(video, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    (row,) = json.loads(result.stdout)["videos"]
    assert (row["video"], row["frames"], row["fps"]) == (str(video), 48, 16)
    names = list(GENERAL.values())
    assert list(row["measures"]) == list(row["drift"]) == names
    assert not set(names) & set(METRICS)  # a name means one thing
    assert row["unmeasured"] == list(METRICS)
    assert row["measures"]["motion_speed"] == pytest.approx(24 / 64, rel=0.25)
    table = run(video, video)
    assert table.exit_code == 0
    assert all(table.stdout.count(name) == 2 for name in (*names, *METRICS))


def test_a_measure_with_facts_and_one_without_are_two() -> None:
    """Of one video with lamps: the leaderboard's, which know the world, and those of any video."""
    frames = world.make_clip(world.HELD_OUT[0], 0, 96).video
    found = []
    for facts in (facts_of(world.HELD_OUT[0]), Facts(fps=16)):
        observer = Observer(facts)
        observer.add(frames)
        found.append(observer.finish())
    known, (values, drifts) = measures(found[0], 0, 96), general_measures(found[1])
    plain = measures(found[1], 0, 96)
    assert known["subject_consistency"] > values["foreground_likeness"] + 0.1
    assert values == pytest.approx({new: plain[old] for old, new in GENERAL.items()}, nan_ok=True)
    assert drifts == pytest.approx({new: drift(found[1])[old] for old, new in GENERAL.items()}, nan_ok=True)


def test_files_that_are_no_video(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    assert "must be a video that libav decodes" in complaint(text)
    assert "give a file, e.g. video.mp4" in complaint(tmp_path / "absent.mp4")
    assert "give a file" in complaint(tmp_path)


def test_options_that_do_not_fit(video: Path, tmp_path: Path) -> None:
    assert "--prompts goes with --vbench" in complaint(video, "--prompts", video)
    assert "--output goes with --vbench" in complaint(video, "--output", tmp_path)
    assert "got no --prompts and --output" in complaint(video, "--vbench")


def prompts_file(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_vbench_says_what_is_missing(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [video, "--vbench", "--prompts", prompts_file(tmp_path, "a"), "--output", tmp_path / "out"]
    monkeypatch.setattr(vbench, "find_spec", lambda name: None)
    assert "isn't installed; install it with: pip install vbench" in complaint(*words)
    monkeypatch.setattr(vbench, "find_spec", lambda name: object())
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "cache"))
    line = complaint(*words)
    assert str(tmp_path / "cache") in line
    assert "clip_model/ViT-B-32.pt" in line
    assert not (tmp_path / "out").exists()


def test_vbench_runs_where_it_is_installed(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, asked = tmp_path / "cache", {}
    for name in (name for names in vbench.WEIGHTS.values() for name in names):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).touch()

    class VBench:
        def __init__(self, device: str, full: str, output: str) -> None:
            self.output = Path(output)
            self.output.mkdir()

        def evaluate(self, **options: object) -> None:
            asked.update(options)
            found = {name: [0.5, []] for name in vbench.WEIGHTS}
            (self.output / "kvpack_eval_results.json").write_text(json.dumps(found))

    module = ModuleType("vbench")
    module.VBench, module.__file__ = VBench, str(tmp_path / "vbench" / "__init__.py")
    monkeypatch.setitem(sys.modules, "vbench", module)
    monkeypatch.setattr(vbench, "find_spec", lambda name: object())
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(cache))
    prompts = prompts_file(tmp_path, "a cat", "", "a cat", "a dog")
    result = run(video, video, video, "--vbench", "--prompts", prompts, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["vbench"] == dict.fromkeys(vbench.WEIGHTS, 0.5)
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["a cat-0.mp4", "a cat-1.mp4", "a dog-0.mp4"]
    assert (tmp_path / "out" / "a dog-0.mp4").read_bytes() == video.read_bytes()
    assert (asked["mode"], asked["local"], asked["videos_path"]) == ("custom_input", True, str(tmp_path / "out"))


def test_vbench_judges_what_it_is_given_and_nothing_else(video: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = vbench.lay_out([video, video], ["a", "b"], out)
    assert vbench.lay_out([video, video], ["a", "b"], out) == made  # the same again
    assert vbench.lay_out(made, ["a", "b"], out) == made
    with pytest.raises(OutputError, match=r"holds b-0\.mp4, which VBench would judge too"):
        vbench.lay_out([video], ["a"], out)
    other = bytes(reversed(video.read_bytes()))
    made[1].write_bytes(other)
    with pytest.raises(OutputError, match=r"holds [ab]-0\.mp4"):
        vbench.lay_out(made, ["b", "a"], out)  # each would become the other one
    assert (made[0].read_bytes(), made[1].read_bytes()) == (video.read_bytes(), other)


def test_prompts_and_videos_that_do_not_fit(video: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="got 1 videos and 2 prompts"):
        vbench.lay_out([video], ["a", "b"], tmp_path / "out")
    with pytest.raises(InvalidOptionError, match="VBench reads mp4 files"):
        vbench.lay_out([tmp_path / "a.avi"], ["a"], tmp_path / "out")
    with pytest.raises(InvalidOptionError, match="no slash, got 'a/b'"):
        vbench.read_prompts(prompts_file(tmp_path, "a/b"))
    with pytest.raises(InvalidOptionError, match="one prompt a line"):
        vbench.read_prompts(tmp_path / "absent.txt")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="give a writable directory"):
        vbench.lay_out([video], ["a"], tmp_path / "file")
