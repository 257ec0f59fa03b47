"""The demo writes what it says, the same for every order of stacks, and nothing when it cannot."""

from __future__ import annotations

import dataclasses
import json
import re
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

import kvpack
from helpers import pixels
from kvpack import shipped
from kvpack.cli import demo
from kvpack.cli.demo_draw import Sheet
from kvpack.cli.demo_page import Story, picture
from kvpack.cli.demo_seen import Ends, kept
from kvpack.errors import InvalidOptionError, OutputError, UnknownNameError
from kvpack.evaluation.tiny import wall_mask
from kvpack.pipeline.track import Track
from kvpack.planning import planner
from kvpack.plugins.registry import registry

SHIPPED = Path(kvpack.__file__).parent / "data" / "toyworld"
STATS = {"attended_bytes": 3, "archive_bytes": 1, "resident_bytes": 5}


def make(model: Path, folder: Path, *stacks: str, seconds: float = 1.5, prompt: str = "a red circle") -> demo.Demo:
    return demo.Demo(prompt, seconds, [(stack, {}) for stack in stacks], folder, steps=1, model=model)


def test_one_stack(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    result = demo.run(
        make(model, tmp_path / "new" / "out", "packforcing"), lambda track: seen.append((track.frames, track.chunks))
    )
    assert seen == [(13, 2), (21, 2)]
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == [
        f"demo.{each}" for each in ("html", "json", "mp4", "png")
    ]
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


def test_what_is_kept_of_a_video_is_the_same_however_the_frames_arrive() -> None:
    rng = np.random.default_rng(0)
    video = np.zeros((100, 64, 64, 3), np.uint8)
    wall = wall_mask("left")
    video[0:10, wall], video[20:30, wall], video[40:50, wall] = (250, 40, 40), (250, 40, 40), (40, 90, 250)
    video[:, 30:40, 30:40] = rng.integers(200, 256, (10, 10, 3))
    found = []
    for step in (100, 7):
        seen = demo.Seen([0, 33, 99])
        for first in range(0, 100, step):
            frames = video[first : first + step]
            track = SimpleNamespace(frames=first + len(frames), stats=STATS)
            seen.add(cast(Track, track), frames, 0.5)
        found.append(seen)
    whole, pieces = found
    assert all(np.array_equal(each.stills[1], video[33]) for each in found)
    assert sorted(pieces.stills) == [0, 1, 2]
    assert whole.returns() == pieces.returns() == [(20 / 16, True), (40 / 16, False)]
    assert (pieces.used, pieces.held, pieces.ends[-1]) == ([4] * 15, [5] * 15, 100 / 16)


def test_the_picture_and_the_page_tell_what_was_seen(model: Path, tmp_path: Path) -> None:
    demo.run(make(model, tmp_path, "packforcing", "self-forcing"), lambda _: None)
    text = (tmp_path / "demo.html").read_text()
    assert 'src="demo.mp4"' in text
    assert "keeps the last 5 seconds" in text
    assert not re.search(r"""(?:src|href)=["']https?:""", text)
    alone = Image.open(tmp_path / "demo.png")
    assert alone.size[0] == 1400
    asked = dataclasses.replace(make(model, tmp_path, "packforcing", "self-forcing"), seeds=2)
    demo.run(asked, lambda _: None)
    assert Image.open(tmp_path / "demo.png").size[1] > alone.size[1] + 2 * 128  # a row of ends for each


def test_as_many_memories_and_seeds_as_are_asked_for_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []
    chart = Sheet.chart

    def counted(sheet: Sheet, box: Any, title: str, curves: Any, end: float) -> None:
        drawn.append([curve.name for curve in curves])
        chart(sheet, box, title, curves, end)

    monkeypatch.setattr(Sheet, "chart", counted)
    names, green = [f"memory {number}" for number in range(16)], np.full((64, 64, 3), (0, 200, 0), np.uint8)
    seen = [demo.Seen([0]) for _ in names]
    for each in seen:
        for frames in (1, 2):
            each.add(cast(Track, SimpleNamespace(frames=frames, stats=STATS)), green[None], 0.5)
    ends = {name: Ends([green] * 10, [0.5] * 10) for name in names}
    sheet = np.asarray(Image.open(BytesIO(picture(Story("a", 1.0, [0.0], names, seen, [], ends, 1.0)))).convert("RGB"))
    assert drawn == [names, names]
    tiles = (sheet == (0, 200, 0)).all(axis=2)
    assert tiles.sum() == len(names) * 11 * 128**2  # of each a picture of its video, and of the ends of ten others
    assert (sheet[:, -1] == 255).all()
    assert (sheet[-24:] == 255).all()


def test_what_is_kept_is_that_of_the_usual_prompt() -> None:
    known = kept()
    assert known is not None
    assert (known.prompt, known.seconds) == (demo.PROMPT, 120)
    assert list(known.ends) == [*demo.MEMORIES, "truth"]
    for name in demo.MEMORIES:  # where this fails: python -m benchmarks.demo --only NAME
        assert known.of(name, shipped.demo_stack(name)), name
    assert len(known.truth) == demo.COLUMNS
    for ends in known.ends.values():
        assert len(ends.pictures) == len(ends.likeness) == 8
        assert ends.pictures[0].shape == (64, 64, 3)
        assert all(0 <= each <= 1 for each in ends.likeness)


def test_the_kept_ends_are_shown_with_the_memories_that_are_asked_for(tmp_path: Path) -> None:
    """And only where the videos are those that were kept."""
    pipeline: Any = None
    stacks = {name: shipped.demo_stack(name) for name in ("full", "h2o")}
    asked = demo.Demo(demo.PROMPT, 120, [], tmp_path)
    truth, ends, seconds = demo._besides(asked, pipeline, stacks, range(8), 1917)
    assert (len(truth), list(ends), seconds) == (8, ["full", "truth"], 120)
    stacks["full"] = shipped.demo_stack("full", chunk_frames=2)  # another memory than that which was kept
    assert demo._besides(asked, pipeline, stacks, range(8), 1917)[1] == {}
    for other in (dataclasses.replace(asked, prompt="a circle"), dataclasses.replace(asked, steps=3)):
        assert demo._besides(other, pipeline, stacks, range(8), 1917) == ([], {}, 0.0)
    assert demo._besides(asked, pipeline, stacks, range(8), 77)[0] == []


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
    with pytest.raises(OutputError, match=r"cannot make the directory .*file.*; give another folder"):
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
