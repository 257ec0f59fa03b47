"""`kvpack generate --fork-at` writes whole videos that share their beginning, or one line about what is wrong."""

import numpy as np
import pytest

from helpers import command, complaint, pixels, told
from kvpack.cli.futures import Future, read_futures
from kvpack.media.video import VideoWriter
from kvpack.pipeline import track as generation

FUTURES = """{}
a blue square

{"prompt": "a blue square", "seed": 7, "cut": true}
"""


def words(model, output, *more):
    small = ["--height", 16, "--width", 32, "--steps", 2, "--guidance-scale", 1, "--call", "max_sequence_length=8"]
    memory = ["--stack", "packforcing", "-o", "chunk_frames=2", "-o", "sink_frames=2", "-o", "recent_frames=2"]
    whole = ["generate", "--model", model, "--prompt", "a red circle", "--seconds", 1.85, "--output", output]
    return [*whole, *small, *memory, "--device", "cpu", *more]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "futures.txt"
    path.write_text(FUTURES)
    return path


def test_futures_share_what_was(model, file, tmp_path):
    plain = told(*words(model, tmp_path / "plain.mp4", "--json"))
    report = told(*words(model, tmp_path / "fox.mp4", "--fork-at", 0.6, "--prompts", file, "--json"))
    assert plain["frames"] == 29
    assert report["shared_frames"] == 13  # the chunk that shows 0.6 s, frame 10, ends there
    assert [(each["prompt"], each["seed"], each["frames"]) for each in report["futures"]] == [
        (None, None, 29),
        ("a blue square", None, 29),
        ("a blue square", 7, 29),
    ]
    paths = [tmp_path / f"fox-{number}.mp4" for number in (1, 2, 3)]
    assert sorted(tmp_path.iterdir()) == sorted([file, tmp_path / "plain.mp4", *paths])
    assert paths[0].read_bytes() == (tmp_path / "plain.mp4").read_bytes()
    one, two, three = map(pixels, paths)
    for other in (two, three):
        apart = np.abs(one.astype(int) - other).mean(axis=(1, 2, 3))
        assert not apart[:12].any()  # of the frame before another one the codec loses something else
        assert apart[13:].max() > 4
    assert np.abs(two[13:].astype(int) - three[13:]).mean() > 2


def test_a_video_that_is_whole_stays(model, file, tmp_path, monkeypatch):
    """An error in the second future leaves the first."""
    write = VideoWriter.write

    def failing(self, frames):
        if self.path.name == "fox-2.mp4" and self.frames >= 13:
            raise MemoryError("of the test")
        write(self, frames)

    monkeypatch.setattr(VideoWriter, "write", failing)
    result = command(*words(model, tmp_path / "fox.mp4", "--fork-at", 0.6, "--prompts", file))
    assert result.exit_code == 1
    assert "out of memory: of the test" in result.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "fox-1.mp4",
        "fox-2.part.mp4",
        "fox-3.part.mp4",
        "futures.txt",
    ]
    assert len(pixels(tmp_path / "fox-1.mp4")) == 29


def test_in_the_last_chunk(model, file, tmp_path):
    report = told(*words(model, tmp_path / "fox.mp4", "--fork-at", 1.75, "--prompts", file, "--json"))
    assert report["shared_frames"] == 21
    assert [each["frames"] for each in report["futures"]] == [29] * 3
    short = [*words(model, tmp_path / "one.mp4", "--fork-at", 0.1, "--prompts", file), "--seconds", 0.2]
    assert "the whole video is one chunk, of which nothing can be shared" in complaint(*short)
    assert not list(tmp_path.glob("one*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fork-at", 0.6], "and --prompts, how; give both"),
        (["--fork-at", 5, "--prompts", "{file}"], "--fork-at must be > 0 and < --seconds 1.85, got 5"),
        (["--fork-at", 0.6, "--prompts", "{file}", "--checkpoint-every", 1], "does not go with --checkpoint-every"),
        (["--fork-at", 0.6, "--prompts", "{file}", "--trace", "t.jsonl"], "does not go with --trace"),
        (["--fork-at", 0.6, "--prompts", "nowhere.txt"], "cannot read nowhere.txt: No such file"),
    ],
)
def test_wrong_words(more, message, model, file, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "load_pipeline", lambda *_: pytest.fail("the model was loaded"))
    given = [str(each).format(file=file) for each in more]
    assert message in complaint(*words(model, tmp_path / "fox.mp4", *given))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a fox", "has 1 lines; give two or more"),
        ("a fox\na fox", "each another one"),
        ('a fox\n{"prompt": 3}', "line 2 must be"),
        ('{"seed": true}\n{}', "line 1 must be"),
        ('{"speed": 1}\n{}', "line 1 must be"),
        ('{"prompt": \n{}', "line 1 must be"),
        ('{"seed": 36893488147419103232}\n{}', "seed must be a whole number between"),
        (b"\xff\xfe\n", "it is no UTF-8 text"),
    ],
)
def test_wrong_files(text, message, tmp_path):
    path = tmp_path / "futures.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_futures(path)


def test_a_file(file):
    assert read_futures(file) == [Future(), Future("a blue square"), Future("a blue square", 7, True)]


def test_a_file_of_another_editor(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes("\ufeffa fox\u2028runs\r\na cat\r\n".encode())
    assert [each.prompt for each in read_futures(path)] == ["a fox\u2028runs", "a cat"]
