"""A file of prompts: its lines are right, or refused by number before anything starts; a folder knows what it holds."""

import json
import os
from dataclasses import replace

import pytest

from helpers import complaint
from kvpack.batch.folder import BatchFolder, checksum
from kvpack.batch.videos import Settings, Video, read_videos
from kvpack.errors import InvalidOptionError, OutputError

SETTINGS = Settings("model", None, 16.0, 4, 10, "float32", "cpu", {"topk": 2}, {"num_inference_steps": 2})
FOX = Video("fox", "a fox", 3, 2.0)


def read(path, *lines, seconds=2.0):
    path = path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return read_videos(path, 7, seconds, SETTINGS.frames)


def test_lines_are_videos(tmp_path):
    lines = ['{"prompt": "a fox"}', "", '{"prompt": [[0, "a"], [1, "b", "cut"]], "seed": 1, "seconds": 9, "name": "b"}']
    assert read(tmp_path, *lines) == [
        Video("0001", "a fox", 7, 2.0),
        Video("b", [[0, "a"], [1, "b", "cut"]], 1, 9),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: this is no JSON"),
        ('"a fox"', "line 2: a line is an object with a prompt"),
        ('{"seed": 1}', "line 2: a line is an object with a prompt"),
        ('{"prompt": 1}', "line 2: a prompt is a text, or a schedule"),
        ('{"prompt": ["a", "b"]}', "line 2: a prompt is a text, or a schedule"),
        ('{"prompt": [[1, "a"]]}', "line 2: a prompt schedule begins at 0 seconds"),
        ('{"prompt": "a", "steps": 4}', "line 2: steps is no key of a line"),
        ('{"prompt": "a", "seed": true}', "line 2: seed must be a whole number"),
        ('{"prompt": "a", "seed": 18446744073709551616}', "line 2: seed must be a whole number"),
        ('{"prompt": "a", "seconds": "9"}', "line 2: seconds must be a number > 0, got '9'"),
        ('{"prompt": "a", "seconds": NaN}', "line 2: seconds must be a number > 0, got nan"),
        ('{"prompt": "a", "seconds": 0.01}', "line 2: seconds must be at least 0.0625"),
        ('{"prompt": "a", "seconds": null}', "line 2: it does not say its seconds"),
        ('{"prompt": "a", "name": "../a"}', "line 2: a name is of letters"),
        ('{"prompt": "a", "name": "a/b"}', "line 2: a name is of letters"),
        ('{"prompt": "a", "negative_prompt": 1}', "line 2: negative_prompt must be a text"),
        ('{"prompt": "a", "name": "0001"}', "lines 1 and 2 have the name 0001"),
        ('{"prompt": "a fox"}', "lines 1 and 2 ask for the same video"),
    ],
)
def test_a_wrong_line_is_named(line, message, tmp_path):
    with pytest.raises(InvalidOptionError) as error:
        read(tmp_path, '{"prompt": "a fox"}', line)
    assert message in str(error.value)


def test_a_file_without_prompts(tmp_path):
    with pytest.raises(InvalidOptionError, match="holds no prompt"):
        read(tmp_path, "", " ")
    with pytest.raises(InvalidOptionError, match=r"cannot read .*absent: No such file"):
        read_videos(tmp_path / "absent", 0, 1.0)


def test_what_is_wrong_is_said_before_anything_starts(model, tmp_path):
    path, output = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "negative_prompt": "c"}')
    words = ["batch", path, "--model", model, "--output", output]
    assert "line 1: it does not say its seconds" in complaint(*words)
    words += ["--seconds", 2]
    assert "line 2: a negative prompt needs guidance" in complaint(*words, "--guidance-scale", 1)
    assert "--call num_frames cannot be given" in complaint(*words, "--call", "num_frames=3")
    assert "no stack named 'fulll'" in complaint(*words, "--stack", "fulll")
    generate = ["generate", "--model", model, "--output", output, "--seconds", 2]
    assert "--prompt TEXT for one video, --prompts FILE for many" in complaint(*generate)
    assert "--prompts does not go with --prompt" in complaint(*generate, "--prompts", path, "--prompt", "a")
    assert not output.exists()


def test_a_second_call_asks_for_the_same(tmp_path):
    folder = BatchFolder(tmp_path / "out")
    folder.ask(SETTINGS, [FOX])
    folder.ask(SETTINGS, [FOX, replace(FOX, name="other", seed=4)])
    with pytest.raises(OutputError, match="of fox it was seed 3, now it is 5"):
        folder.ask(SETTINGS, [replace(FOX, seed=5)])
    with pytest.raises(OutputError, match="of other it was seed 4"):  # asked for by the second call, and kept
        folder.ask(SETTINGS, [replace(FOX, name="other")])
    with pytest.raises(OutputError, match="its settings were every 10, now it is 5"):
        folder.ask(replace(SETTINGS, every=5), [FOX])
    (folder.path / "batch.json").write_text("[]")
    with pytest.raises(OutputError, match=r"batch\.json is damaged"):
        folder.ask(SETTINGS, [FOX])


def test_videos_of_others_are_left_alone(tmp_path):
    folder = BatchFolder(tmp_path)
    (tmp_path / "fox.mp4").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"fox\.mp4 exists, and is not of this batch"):
        folder.ask(SETTINGS, [FOX])


def test_the_manifest_is_held_against_the_files(tmp_path):
    folder = BatchFolder(tmp_path)
    (tmp_path / "fox.mp4").write_bytes(b"video")
    folder.note({"name": "fox", "error": "once"})
    assert folder.made() == {}
    folder.note({"name": "fox", "sha256": checksum(tmp_path / "fox.mp4")})
    with open(tmp_path / "manifest.jsonl", "a") as file:
        file.write('{"name": "cut o')
    assert list(folder.made()) == ["fox"]
    (tmp_path / "fox.mp4").write_bytes(b"other")
    with pytest.raises(OutputError, match=r"fox\.mp4 is not what manifest\.jsonl says; remove it"):
        folder.made()
    (tmp_path / "fox.mp4").unlink()
    assert folder.made() == {}
    assert [json.loads(line)["name"] for line in (tmp_path / "manifest.jsonl").read_text().splitlines()[:2]] == [
        "fox"
    ] * 2


def test_a_line_that_a_full_disk_cuts_off_is_an_error_and_spoils_no_other(tmp_path, monkeypatch):
    folder, write = BatchFolder(tmp_path), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:10]))
        with pytest.raises(OutputError, match=r"manifest\.jsonl: No space left on device"):
            folder.note({"name": "fox"})
    folder.note({"name": "cat"})
    folder.note({"name": "dog"})
    assert [entry["name"] for entry in folder.entries()] == ["cat", "dog"]


def test_files_of_other_editors(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes('\ufeff{"prompt": "a fox\u2028runs"}\r\n\r\n{"prompt": "a cat"}\r\n'.encode())
    assert [(each.name, each.prompt) for each in read_videos(path, 0, 1.0)] == [
        ("0001", "a fox\u2028runs"),
        ("0003", "a cat"),
    ]
