"""The demo writes what it says, the same for every order of stacks, and nothing when it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kvpack
from helpers import pixels
from kvpack import shipped
from kvpack.cli import demo
from kvpack.errors import InvalidOptionError, OutputError, UnknownNameError
from kvpack.pipeline.track import Track
from kvpack.planning import planner
from kvpack.plugins.registry import registry

SHIPPED = Path(kvpack.__file__).parent / "data" / "toyworld"


def make(model: Path, folder: Path, *stacks: str, seconds: float = 1.5, prompt: str = "a red circle") -> demo.Demo:
    return demo.Demo(prompt, seconds, [(stack, {}) for stack in stacks], folder, steps=1, model=model)


def test_one_stack(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    result = demo.run(
        make(model, tmp_path / "new" / "out", "packforcing"), lambda track: seen.append((track.frames, track.chunks))
    )
    assert seen == [(13, 2), (21, 2)]
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["demo.json", "demo.mp4", "demo.png"]
    assert pixels(tmp_path / "new" / "out" / "demo.mp4").shape == (21, 384, 384, 3)
    assert json.loads((tmp_path / "new" / "out" / "demo.json").read_text()) == result
    assert (result["frames"], result["fps"]) == (21, 16)
    assert torch.get_num_threads() == threads
    (only,) = result["stacks"]
    assert only["stack"] == shipped.demo_stack("packforcing").to_dict()
    assert only["stats"]["attended_bytes"] > 0
    assert len(only["chunk_seconds"]) == 2
    assert Image.open(tmp_path / "new" / "out" / "demo.png").size[0] > 128
    assert capsys.readouterr().err == ""


def test_stacks_stand_side_by_side_and_do_not_touch_each_other(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[np.ndarray] = []
    write = demo.VideoWriter.write
    monkeypatch.setattr(demo.VideoWriter, "write", lambda self, frames: (written.append(frames), write(self, frames)))
    names = ["full", "self-forcing", "packforcing"]
    result = demo.run(make(model, tmp_path, *names, seconds=2), lambda _: None)
    together = pixels(tmp_path / "demo.mp4")
    assert together.shape == (29, 28 + 256, 3 * 256 + 2 * 8, 3)
    assert [each["stack"]["name"] for each in result["stacks"]] == names
    assert [each["frames"] for each in result["stacks"]] == [29, 29, 29]
    panel = np.concatenate(written)[:, 28::4, -256::4]
    written.clear()
    alone = demo.run(make(model, tmp_path / "alone", "packforcing", seconds=2), lambda _: None)
    same = ("attended_bytes", "archive_bytes", "chunks", "frames")
    assert [alone["stacks"][0]["stats"][key] for key in same] == [result["stacks"][2]["stats"][key] for key in same]
    assert np.array_equal(panel, np.concatenate(written))


def test_stacks_of_other_chunk_lengths_are_kept_in_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "demo_stack", lambda name: registry().stack(name, {}))
    result = demo.run(make(model, tmp_path, "full", "self-forcing"), lambda _: None)
    assert [each["stack"]["chunk_frames"] for each in result["stacks"]] == [4, 3]
    assert len(pixels(tmp_path / "demo.mp4")) == 21


def test_stacks_of_the_demo_have_the_sizes_of_the_training() -> None:
    for name in ("full", "self-forcing", "packforcing", "packforcing-paper"):
        assert shipped.demo_stack(name).chunk_frames == 4
    assert shipped.demo_stack("self-forcing").to_dict()["partitioner"] == {
        "policy": "window",
        "window_frames": 20,
        "sink_frames": 0,
    }
    packed = shipped.demo_stack("packforcing").to_dict()
    assert packed["reindexer"] == {"policy": "fit", "train_frames": shipped.TRAINING["train_frames"]}
    with pytest.raises(UnknownNameError, match="did you mean 'packforcing'"):
        shipped.demo_stack("packforcin")


def test_samples_are_the_same_however_the_frames_arrive() -> None:
    video = np.random.default_rng(0).integers(0, 256, (100, 4, 4, 3), dtype=np.uint8)
    whole, pieces = (demo.Samples([0, 33, 68], 32) for _ in range(2))
    whole.add(0, video)
    for first in range(0, 100, 7):
        pieces.add(first, video[first : first + 7])
    for a, b in zip(whole.rows("x"), pieces.rows("x"), strict=True):
        assert all(np.array_equal(p, q) for p, q in zip(a.pictures, b.pictures, strict=True))
    assert np.array_equal(whole.stills[1], video[33])
    assert np.array_equal(whole.trails[1], video[33:65:4].max(axis=0))
    assert [len(row.pictures) for row in whole.rows("x")] == [3, 3]


def test_words_that_the_pipeline_does_not_know_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.run(make(model, tmp_path, "full", seconds=0.5, prompt="a purple circle"), lambda _: None)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: the demo's pipeline does not know purple; it knows a, blue, circle,")


def test_bad_input_is_found_before_the_model_is_loaded(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(demo, "load_pipeline", load)
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "demo.png").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot make the directory .*file.*; give another --output"):
        demo.run(make(model, tmp_path / "file", "full"), lambda _: None)
    with pytest.raises(OutputError, match=r"demo\.png: it is a directory"):
        demo.run(make(model, tmp_path / "taken", "full"), lambda _: None)
    with pytest.raises(UnknownNameError, match="no stack named 'nothing'"):
        demo.run(make(model, tmp_path, "full", "nothing"), lambda _: None)
    with pytest.raises(InvalidOptionError, match="seconds must be a number > 0"):
        demo.run(make(model, tmp_path, "full", seconds=-1), lambda _: None)


def test_an_interrupted_demo_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def interrupt(track: Track) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.run(make(model, tmp_path, "full", "packforcing"), interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_pipeline_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shipped.resources, "files", lambda _: tmp_path)
    with pytest.raises(InvalidOptionError, match="not in this installation"):
        shipped.shipped_folder()


def test_the_shipped_pipeline_knows_the_default_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = demo.run(demo.Demo(demo.PROMPT, 3, [("packforcing", {})], tmp_path), lambda _: None)
    assert capsys.readouterr().err == ""
    _, latent_frames = planner.video_frames(3, 16, 4)
    assert result["stacks"][0]["stats"]["chunks"] == latent_frames // 4
    brightest = pixels(tmp_path / "demo.mp4").max(axis=3)
    assert (brightest > 0.58 * 255).mean() > 0.005  # the object is the only bright thing
