"""One process of a batch: the videos are those of `kvpack generate`, whatever ended an earlier process and where."""

import shutil

import pytest

from helpers import told
from kvpack.batch.folder import BatchFolder
from kvpack.batch.videos import Settings, Video
from kvpack.batch.work import Work
from kvpack.errors import KVPackError
from kvpack.pipeline import checkpoints

CALL = {"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 8}
RED = Video("red", "a red circle", 0, 3.5)
BLUE = Video("blue", [[0, "a blue square"], [1, "a red circle", "cut"]], 4, 2.5)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The files of single runs."""
    found = {}
    small = ["--height", 64, "--width", 64, "--steps", 1, "--guidance-scale", 1, "--call", "max_sequence_length=8"]
    small += ["--device", "cpu", "-o", "topk=2", "--checkpoint-every", 1, "--json"]
    for video in (RED, BLUE):
        output = tmp_path_factory.mktemp("whole") / "a.mp4"
        words = ["generate", "--model", model, "--prompt", video.prompt, "--seconds", video.seconds]
        told(*words, "--seed", video.seed, "--output", output, *small)
        found[video.name] = output.read_bytes()
    return found


@pytest.fixture
def work(model, tmp_path):
    settings = Settings(str(model), None, 16.0, 4, 1, "float32", "cpu", {"topk": 2}, CALL)
    folder = BatchFolder(tmp_path)
    folder.ask(settings, [RED, BLUE])
    return Work(settings, folder)


def made(work, video):
    """The file of a video, and the frames that it had at the beginning and the end."""
    first, *_, last = work.make(video)
    assert not work.folder.checkpoint(video).exists()
    return work.folder.output(video).read_bytes(), first, last


def test_videos_of_one_pipeline_are_those_of_single_runs(work, whole):
    assert made(work, BLUE) == (whole["blue"], 0, 37)
    assert made(work, RED) == (whole["red"], 0, 53)
    entry = work.entry(RED, 53)
    assert (entry["name"], entry["seed"], entry["frames"], entry["bytes"]) == ("red", 0, 53, len(whole["red"]))
    work.folder.note(entry)
    assert list(work.folder.made()) == ["red"]


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_video_goes_on_from_its_checkpoint(chunks, work, whole):
    steps = work.make(RED)
    frames = [next(steps) for _ in range(chunks + 1)][-1]
    del steps  # as if its process had ended
    assert made(work, BLUE)[0] == whole["blue"]
    file, first, last = made(work, RED)
    assert (first, last) == (frames, 53)
    assert file == whole["red"]


def test_a_process_that_ends_before_the_first_checkpoint_or_behind_the_last_word(work, whole, monkeypatch):
    folder = work.folder.checkpoint(RED)
    folder.mkdir()
    (folder / "generate.json").write_text("{}")  # and no snapshot
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "remove", lambda folder: (folder / "generate.json").unlink())
        assert [*work.make(RED)][-1] == 53
    assert folder.exists()
    assert [*work.make(RED)] == [53]  # nothing is made again
    assert work.folder.output(RED).read_bytes() == whole["red"]


def test_an_interrupt_leaves_no_video_that_looks_whole(work, whole, monkeypatch):
    steps = work.make(RED)
    [next(steps) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    assert not work.folder.output(RED).exists()
    shutil.rmtree(work.folder.checkpoint(RED))  # begin it anew
    assert made(work, RED) == (whole["red"], 0, 53)


def test_what_cannot_be_gone_on_with_is_said(work):
    steps = work.make(RED)
    [next(steps) for _ in range(2)]
    del steps
    next(work.folder.checkpoint(RED).glob("segments/*.mp4")).unlink()
    with pytest.raises(KVPackError, match="is missing or not what was written"):
        made(work, RED)
