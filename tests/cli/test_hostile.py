"""Files of prompts, futures, batches and checkpoints from strangers: one line of an error, and nothing else."""

import json
from hashlib import sha256

import pytest
from hostile import DEEP, JSON, NUMBERS, tried
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpack.batch.folder import BatchFolder
from kvpack.batch.videos import Settings, Video, read_videos
from kvpack.cli.futures import read_futures
from kvpack.errors import InvalidOptionError, KVPackError
from kvpack.media.segments import Segment, SegmentedVideo
from kvpack.pipeline.checkpoints import Job

MANY = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def objects(*keys, **known):
    """JSON objects with some of these keys, whose values are anything, or what is known to be right."""
    return st.fixed_dictionaries({}, optional={key: JSON | known.get(key, JSON) for key in keys}) | JSON


SCHEDULE = st.lists(st.lists(NUMBERS | st.just("cut") | st.text(max_size=3), max_size=4), max_size=3)
LINE = objects("prompt", "name", "seed", "seconds", "negative_prompt", "x", prompt=st.just("a") | SCHEDULE).map(
    json.dumps
)
FUTURE = objects("prompt", "seed", "cut", "x", prompt=st.just("a"), cut=st.booleans()).map(json.dumps)


@MANY
@given(lines=st.lists(LINE | st.text(max_size=9), max_size=3), junk=st.binary(max_size=4))
def test_any_file_of_prompts(lines, junk, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + junk)
    own = Settings("model", None, 16.0, 4, 1, "float32", "cpu")
    for video in tried(read_videos, path, 0, 5.0, own.frames) or ():
        output = BatchFolder(tmp_path / "out").output(video)
        assert output.parent == tmp_path / "out"
        assert -(2**63) <= video.seed < 2**64
        assert own.frames(video) > 0


HUGE = [{"prompt": [[0, "a"], [10**400, "b"]]}, {"prompt": "a", "seconds": 10**400}, {"prompt": "a", "seed": 10**400}]
HUGE += [
    {"prompt": "a", "seconds": float("nan")},
    {"prompt": "a", "seconds": 1e300},
    {"prompt": [[0, "a"], [1e300, "b"]]},
]


@pytest.mark.parametrize("line", HUGE)
def test_numbers_that_are_larger_than_any_video(line, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line))
    assert (
        tried(read_videos, tmp_path / "prompts.jsonl", 0, 5.0, Settings("m", None, 16.0, 4, 1, "float32", "cpu").frames)
        is None
    )


@MANY
@given(lines=st.lists(FUTURE | st.text(max_size=9), min_size=1, max_size=4), junk=st.binary(max_size=4))
def test_any_file_of_futures(lines, junk, tmp_path):
    path = tmp_path / "futures.txt"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + junk)
    for future in tried(read_futures, path) or ():
        assert isinstance(future.prompt, str | None)
        assert isinstance(future.cut, bool)


@pytest.mark.parametrize(
    "read", [lambda path: read_videos(path, 0, 5.0), read_futures, lambda path: Job.read(path.parent)]
)
def test_files_that_are_deep_or_a_gigabyte(read, tmp_path):
    path = tmp_path / "generate.json"
    path.write_text(f"{{{DEEP}\n{{{DEEP}x")
    assert tried(read, path) is None
    with open(path, "wb") as file:
        file.truncate(2**30)
    with pytest.raises(KVPackError, match="1073741824 bytes"):
        read(path)


JOB = {
    "model": "m",
    "output": "o.mp4",
    "prompt": "p",
    "seed": 0,
    "fps": 16.0,
    "every": 1,
    "dtype": "float32",
    "device": "cpu",
}


@MANY
@given(data=st.data())
def test_any_job_of_a_folder_of_checkpoints(data, tmp_path):
    tree = data.draw(JSON | st.just({**JOB, data.draw(st.sampled_from([*JOB, "x"])): data.draw(JSON)}))
    (tmp_path / "generate.json").write_text(json.dumps(tree))
    job = tried(Job.read, tmp_path)
    if job is not None:
        assert job.output.endswith(".mp4")
        assert 0 < job.fps < 1e9
        assert job.every >= 1


@MANY
@given(
    tree=JSON | st.lists(objects("name", "frames", "bytes", "sha256", frames=st.just(3)), max_size=2), data=st.data()
)
def test_any_list_of_segments(tree, data, tmp_path):
    (tmp_path / "outside.mp4").write_bytes(b"x")
    whole = {"name": "segment-000001.mp4", "frames": 3, "bytes": 1, "sha256": sha256(b"x").hexdigest()}
    changed = {**whole, data.draw(st.sampled_from([*whole])): data.draw(JSON | st.just("../outside.mp4"))}
    for done in (tree, [changed]):
        (tmp_path / "segments").mkdir(exist_ok=True)
        (tmp_path / "segments/segment-000001.mp4").write_bytes(b"x")
        video = tried(SegmentedVideo, tmp_path / "segments", 16.0, done)
        assert video is None or all(each == Segment(**{**whole, "frames": each.frames}) for each in video.segments)
    assert (tmp_path / "outside.mp4").exists()


@pytest.mark.parametrize("name", ["\n", "a\0b", "segment-000001\u2028.mp4", "\ud800"])
def test_a_segment_whose_name_is_no_line_is_refused_in_one(name, tmp_path):
    assert tried(SegmentedVideo, tmp_path, 16.0, [{"name": name, "frames": 3, "bytes": 1, "sha256": ""}]) is None


@MANY
@given(
    asked=objects("settings", "videos"),
    entry=objects("name", "sha256", "error", name=st.just("a")),
    junk=st.binary(max_size=4),
)
def test_any_folder_of_a_batch(asked, entry, junk, tmp_path):
    (tmp_path / "batch.json").write_text(json.dumps(asked))
    (tmp_path / "manifest.jsonl").write_bytes(json.dumps(entry).encode() + b"\n" + DEEP.encode() + b"\n" + junk)
    (tmp_path.parent / "x.mp4").touch()
    folder = BatchFolder(tmp_path)
    found = tried(folder.made)
    assert found is None or not any("/" in name for name in found)
    tried(folder.ask, Settings("model", None, 16.0, 4, 1, "float32", "cpu"), [Video("a", "p", 0, 1.0)])


def test_more_lines_than_anybody_asks_for(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("{}\n" * 200_000)
    with pytest.raises(InvalidOptionError, match="has 200000 lines"):
        read_videos(tmp_path / "prompts.jsonl", 0, 5.0)
