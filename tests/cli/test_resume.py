"""`kvpack generate --checkpoint-every` and `kvpack resume`: the same video, whatever ended the first process."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import command, complaint, forked, pixels, told
from kvpack.errors import OutputError
from kvpack.pipeline import checkpoints
from kvpack.pipeline.stream import Stream
from kvpack.pipeline.track import Track
from kvpack.snapshots.lock import FolderLock


def generate(model, output, *more, seconds=3.5):
    # Not smaller: frames of two macroblocks libx264 encodes to other bits at times.
    small = ["--height", 64, "--width", 64, "--steps", 1, "--guidance-scale", 1, "--call", "max_sequence_length=8"]
    words = ["generate", "--model", model, "--prompt", "a red circle", "--seconds", seconds, "--output", output]
    return [*words, *small, "--device", "cpu", "-o", "topk=2", *more]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The video that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "a.mp4"
    told(*generate(model, output, "--checkpoint-every", 1, "--json"))
    assert [path.name for path in output.parent.iterdir()] == ["a.mp4"]
    return output


def stopped(monkeypatch, chunks, error=ZeroDivisionError):
    """Let the generation fail behind so many chunks."""
    step = Track.next_frames

    def failing(self):
        if len(self.chunk_seconds) == chunks:
            raise error
        return step(self)

    monkeypatch.setattr(Track, "next_frames", failing)


@pytest.mark.parametrize("chunks", [1, 3])
def test_resumed_frames_are_those_of_the_whole(chunks, model, whole, tmp_path, monkeypatch):
    output = tmp_path / "a.mp4"
    with monkeypatch.context() as patch:
        stopped(patch, chunks)
        assert isinstance(command(*generate(model, output, "--checkpoint-every", 1)).exception, ZeroDivisionError)
    assert not output.exists()
    report = told("resume", tmp_path / "a.mp4.checkpoint", "--json")
    assert report["frames"] == len(pixels(whole))
    assert report["resumed_frames"] < report["frames"]
    assert np.array_equal(pixels(output), pixels(whole))
    assert output.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_chunks_are_counted_on_from_where_they_stopped(model, tmp_path, monkeypatch):
    step, seen = Track.next_frames, []
    with monkeypatch.context() as patch:
        stopped(patch, 3)
        command(*generate(model, tmp_path / "a.mp4", "--checkpoint-every", 1))
    monkeypatch.setattr(Track, "next_frames", lambda self: (step(self), seen.append((self.done, self.chunks)))[0])
    told("resume", tmp_path / "a.mp4.checkpoint", "--json")
    (first, chunks), (last, _) = seen[0], seen[-1]
    assert (first, last) == (4, chunks)


def test_the_video_is_on_the_disk_for_certain_before_its_checkpoint_goes(model, tmp_path, monkeypatch):
    """Its bytes, then its name, then what it could be made of again: whenever the power fails, one of them is left."""
    output, folder, steps = tmp_path / "a.mp4", tmp_path / "a.mp4.checkpoint", []

    def noted(name, what):
        function = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *each, **more: (steps.append((name, what(*each))), function(*each, **more))[1]
        )

    noted("fsync", lambda descriptor: os.fstat(descriptor).st_ino)
    noted("replace", lambda _, path: Path(path))
    noted("unlink", Path)
    told(*generate(model, output, "--checkpoint-every", 1, "--json"))
    named = steps.index(("replace", output))
    assert steps[named - 1] == ("fsync", output.stat().st_ino)
    assert steps[named + 1] == ("fsync", tmp_path.stat().st_ino)
    gone = [step for step in steps if step[0] == "unlink" and step[1].match("segment-??????.mp4")]
    assert gone
    assert all(steps.index(step) > named + 1 for step in (*gone, ("unlink", folder / "generate.json")))


def test_frames_are_those_without_checkpoints(model, whole, tmp_path, monkeypatch):
    """Encoded apart they differ in what x264 loses; the frames that are handed to the encoder are the same."""
    from kvpack.media.video import VideoWriter

    seen, write = [], VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: (seen.append(frames), write(self, frames))[1])
    for name, more in (("a", []), ("b", ["--checkpoint-every", 2])):
        told(*generate(model, tmp_path / f"{name}.mp4", "--json", *more))
    half = len(seen) // 2
    assert np.array_equal(np.concatenate(seen[:half]), np.concatenate(seen[half:]))
    assert np.abs(pixels(tmp_path / "a.mp4").astype(int) - pixels(whole)).mean() < 4


def test_an_interrupt_leaves_a_video_and_a_way_on(model, whole, tmp_path, monkeypatch):
    output, folder = tmp_path / "a.mp4", tmp_path / "mine"
    with monkeypatch.context() as patch:
        stopped(patch, 2, KeyboardInterrupt)
        done = command(*generate(model, output, "--checkpoint-every", 1, "--checkpoint", folder))
    assert done.exit_code == 130
    assert f"{output.resolve()} holds the" in done.stderr
    assert f"'kvpack resume {folder}' goes on" in done.stderr
    made = pixels(output)
    assert np.array_equal(made, pixels(whole)[: len(made)])
    told("resume", folder, "--json")
    assert np.array_equal(pixels(output), pixels(whole))


def test_a_damaged_checkpoint_costs_no_frame(model, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopped(patch, 3)
        command(*generate(model, tmp_path / "a.mp4", "--checkpoint-every", 1))
    folder = tmp_path / "a.mp4.checkpoint"
    os.truncate(max(folder.glob("tensors-*")), 100)
    with pytest.warns(UserWarning, match="snapshot 3 is used"):
        told("resume", folder, "--json")
    assert np.array_equal(pixels(tmp_path / "a.mp4"), pixels(whole))


def test_killed(model, whole, tmp_path):
    output = tmp_path / "a.mp4"
    process = forked(*generate(model, output, "--checkpoint-every", 1))
    folder = tmp_path / "a.mp4.checkpoint"
    while not list(folder.glob("snapshot-*3.json")) and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    if folder.exists():  # it may have been faster
        told("resume", folder, "--json")
    assert np.array_equal(pixels(output), pixels(whole))


def test_one_process_at_a_time(model, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopped(patch, 1)
        command(*generate(model, tmp_path / "a.mp4", "--checkpoint-every", 1))
    folder = tmp_path / "a.mp4.checkpoint"
    before = sorted(path.name for path in (folder / "segments").iterdir())
    lock = FolderLock(folder)
    assert "is being written by another process" in complaint("resume", folder)
    assert sorted(path.name for path in (folder / "segments").iterdir()) == before
    lock.release()
    told("resume", folder, "--json")
    assert np.array_equal(pixels(tmp_path / "a.mp4"), pixels(whole))


def test_what_is_wrong_is_said_before_a_model_is_loaded(model, tmp_path, monkeypatch):
    def load(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(checkpoints, "load_pipeline", load)
    output = tmp_path / "a.mp4"
    assert "no effect without --checkpoint-every" in complaint(*generate(model, output, "--checkpoint", tmp_path))
    assert "holds no generation" in complaint("resume", tmp_path)
    (tmp_path / "generate.json").write_text("{}")
    assert "generate.json is damaged" in complaint("resume", tmp_path)
    (tmp_path / "generate.json").write_text(json.dumps(dict.fromkeys(checkpoints.Job.__dataclass_fields__, 1)))
    assert "its model is '1'" in complaint("resume", tmp_path)
    (tmp_path / "snapshot-000001.json").write_text("{}")
    more = ["--checkpoint-every", 1, "--checkpoint", tmp_path]
    assert "holds a generation that is not finished" in complaint(*generate(model, output, *more))


def test_a_first_checkpoint_that_cannot_be_written_is_no_dead_end(model, whole, tmp_path, monkeypatch):
    def failing(*_):
        raise OutputError("No space left on device")

    words = generate(model, tmp_path / "a.mp4", "--checkpoint-every", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "save", failing)
        assert "No space left" in complaint(*words)
    told(*words, "--json")
    assert (tmp_path / "a.mp4").read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
