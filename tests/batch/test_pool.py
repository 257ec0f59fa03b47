"""Workers of Ray and of accelerate: a killed one costs no frame, one that always ends holds nobody up."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from benchmarks import batch, report
from helpers import command, complaint, told
from kvpack.batch.cluster import cluster
from kvpack.batch.folder import BatchFolder
from kvpack.batch.pool import Pool
from kvpack.batch.videos import Settings, Video
from kvpack.batch.work import Work
from kvpack.errors import InvalidOptionError
from kvpack.media.files import checksum

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason='needs Ray; pip install "kvpack[ray]"')
CALL = {"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 8}
SMALL = ["--height", 64, "--width", 64, "--steps", 1, "--guidance-scale", 1, "--call", "max_sequence_length=8"]
SMALL += ["--device", "cpu", "-o", "topk=2"]
VIDEOS = [Video("red", "a red circle", 0, 3.5), Video("blue", "a blue square", 4, 2.5), Video("green", "green", 1, 2.5)]


def singly(model, folder, every=1):
    """The files of single runs, by name."""
    found = {}
    for video in VIDEOS:
        words = ["generate", "--model", model, "--prompt", video.prompt, "--seconds", video.seconds]
        told(*words, "--seed", video.seed, "--output", folder / "a.mp4", "--checkpoint-every", every, *SMALL, "--json")
        found[video.name] = (folder / "a.mp4").read_bytes()
    return found


def files(folder):
    return {path.stem: path.read_bytes() for path in folder.glob("*.mp4")}


@needs_ray
def test_killed_workers_cost_no_frame(model, tmp_path):
    folder = BatchFolder(tmp_path / "out")
    settings = Settings(str(model), None, 16.0, 4, 1, "float32", "cpu", {"topk": 2}, CALL)
    folder.ask(settings, VIDEOS)
    events, killed = [], set()

    def killing(event):
        events.append(event)
        if event.kind == "frames" and event.frames > 21 and len(killed) < 2 and event.process not in killed:
            killed.add(event.process)
            os.kill(event.process, signal.SIGKILL)

    with cluster(None, 2) as ray:
        Pool(ray, settings, folder, VIDEOS, 2, 3, killing).run()
    made = folder.made()
    assert sorted(made) == ["blue", "green", "red"]
    assert sum(entry["begun"] - 1 for entry in made.values()) == sum(event.kind == "lost" for event in events) > 0
    assert files(folder.path) == singly(model, tmp_path)


@needs_ray
def test_sigterm_ends_a_batch_in_one_line(model, tmp_path):
    """Ray's own handler would abort the process and say its stack."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "name": "a"}')
    words = ["batch", tmp_path / "p.jsonl", "--model", model, "--seconds", 3600, "--output", tmp_path / "out", *SMALL]
    with (tmp_path / "told").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvpack", *map(str, words)], stdout=said, stderr=said, cwd=tmp_path
        )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out/a.mp4.checkpoint").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 143, (tmp_path / "told").read_text()
    finally:
        process.kill()
    assert (tmp_path / "told").read_text().splitlines()[-1] == "error: interrupted; nothing half-written was left"


def test_no_video_of_the_benchmark_differed():
    rows = report.read(report.RESULTS / "batch.json")
    assert all(bar.verdict(rows).startswith("met ") for bar in batch.BARS)
    assert {row.metric: row.value for row in rows}["workers killed"] > 10


def accelerate(*words):
    launch = ["--cpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    words = [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "kvpack", *words]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)


def test_processes_of_accelerate_share_the_prompts(model, tmp_path):
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out"
    keys = ("name", "prompt", "seed", "seconds")
    path.write_text("\n".join(json.dumps({key: getattr(video, key) for key in keys}) for video in VIDEOS))
    words = ["generate", "--model", model, "--prompts", path, "--seconds", 1, "--output", output]
    done = accelerate(*words, "--checkpoint-every", 1, *SMALL)
    assert done.returncode == 0, done.stderr
    assert files(output) == singly(model, tmp_path)
    report = told("generate", *words[1:], "--checkpoint-every", 1, *SMALL, "--json")  # alone, and nothing is left to do
    entries = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    assert sorted(entry["name"] for entry in entries) == ["blue", "green", "red"]
    assert report["videos"] == [next(each for each in entries if each["name"] == video.name) for video in VIDEOS]
    (output / "blue.mp4").unlink()
    assert told("generate", *words[1:], "--checkpoint-every", 1, *SMALL, "--json") == report


def test_a_bug_in_one_video_of_a_file_keeps_no_other_from_being_made(model, tmp_path, monkeypatch):
    def make(self, video):
        if video.prompt == "red":
            raise KeyError("a bug")
        yield from real(self, video)

    real = Work.make
    monkeypatch.setattr(Work, "make", make)
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": name, "name": name}) for name in ("red", "blue")))
    words = ["generate", "--model", model, "--prompts", tmp_path / "p.jsonl", "--seconds", 1]
    done = command(*words, "--output", tmp_path / "out", *SMALL, "--json")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == "error: red: KeyError: 'a bug'"
    first, second = json.loads(done.stdout)["videos"]
    assert first == {"name": "red", "error": "KeyError: 'a bug'"}
    assert second["sha256"] == checksum(tmp_path / "out/blue.mp4")
    assert [entry["name"] for entry in BatchFolder(tmp_path / "out").entries()] == ["red", "blue"]


class Ended(Exception):
    pass


class Spoilt(Ended):
    cause = ZeroDivisionError("a bug")


class Answer:
    """What Ray hands out for a call that is in work: what it says, one after the other."""

    def __init__(self, *said):
        self.said = list(said)

    def __next__(self):
        return Answer(self.said.pop(0))


def fake_ray(starts, makes):
    """As much of Ray as a pool calls, with the answers of its workers in the order in which they are asked."""
    starts, makes, killed = iter(starts), iter(makes), []

    def get(answer):
        if isinstance(answer.said[0], Exception):
            raise answer.said[0]
        return answer.said[0]

    make = SimpleNamespace(remote=lambda video: Answer(*next(makes)))
    start = SimpleNamespace(remote=lambda: Answer(next(starts)))
    worker = SimpleNamespace(start=start, make=SimpleNamespace(options=lambda num_returns: make))
    return SimpleNamespace(
        exceptions=SimpleNamespace(RayError=Ended, RayTaskError=Spoilt),
        remote=lambda **_: lambda actor: SimpleNamespace(remote=lambda *_: worker),
        wait=lambda those: (those[:1], those[1:]),
        kill=killed.append,
        get=get,
        killed=killed,
    )


def run(tmp_path, ray, videos, retries):
    """The kinds of events, and the manifest."""
    events, folder = [], BatchFolder(tmp_path)
    settings = Settings("model", None, 16.0, 4, 1, "float32", "cpu")
    Pool(ray, settings, folder, VIDEOS[:videos], 1, retries, events.append).run()
    return [each.kind for each in events if each.kind != "frames"], folder.entries()


def ended(chunks):
    return [*({"frames": 4 * chunk} for chunk in range(chunks + 1)), Ended("killed")]


def made(name):
    return [{"frames": 0}, {"entry": {"name": name, "frames": 9}}]


def test_a_video_that_ends_its_worker_again_and_again_is_given_up(tmp_path):
    ray = fake_ray([(1, None)] * 4, [ended(0), ended(0), ended(0), made("blue")])
    kinds, entries = run(tmp_path, ray, 2, retries=2)
    assert kinds == ["lost", "lost", "failed", "made"]
    error = "its worker ended 3 times behind one and the same checkpoint, at last: killed"
    assert entries == [{"name": "red", "error": error, "begun": 3}, {"name": "blue", "frames": 9, "begun": 1}]


def test_workers_may_be_lost_as_often_as_there_are_checkpoints(tmp_path):
    losses = [ended(chunks) for chunks in (0, 1, 2, 0, 1)]
    kinds, entries = run(tmp_path, fake_ray([(1, None)] * 6, [*losses, made("red")]), 1, retries=1)
    assert kinds == ["lost"] * 5 + ["made"]
    assert entries[0]["begun"] == 6


def test_a_bug_ends_the_process_that_it_came_up_in(tmp_path):
    ray = fake_ray([(1, None)] * 2, [[{"frames": 0}, Spoilt()], made("red")])
    kinds, _ = run(tmp_path, ray, 1, retries=1)
    assert (kinds, len(ray.killed)) == (["lost", "made"], 1)


def test_workers_that_do_not_start(tmp_path):
    with pytest.raises(InvalidOptionError, match=r"no worker is left: each ended .* the pipeline, at last: killed$"):
        run(tmp_path, fake_ray([Spoilt(), Ended("one"), Ended("killed")], []), 1, retries=2)
    with pytest.raises(InvalidOptionError, match=r"no worker is left: .*, at last: a bug$"):
        run(tmp_path, fake_ray([Spoilt()], []), 1, retries=0)
    with pytest.raises(InvalidOptionError, match="does not load"):
        run(tmp_path, fake_ray([(1, "it does not load")], []), 1, retries=2)


def test_without_ray(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}')
    words = ["batch", tmp_path / "a.jsonl", "--model", model, "--seconds", 1, "--output", tmp_path / "out"]
    assert 'a batch needs Ray; pip install "kvpack[ray]"' in complaint(*words)
    assert not (tmp_path / "out").exists()  # so that another batch may go there


def test_videos_that_are_there_need_no_worker(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}')
    words = ["batch", tmp_path / "a.jsonl", "--model", model, "--seconds", 1, "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr("kvpack.batch.cluster.require_ray", lambda: None)
        command(*words)  # asks for it, and starts no worker
    (tmp_path / "out/0001.mp4").write_bytes(b"video")
    line = {
        "name": "0001",
        "seed": 0,
        "frames": 13,
        "fps": 16,
        "begun": 1,
        "sha256": checksum(tmp_path / "out/0001.mp4"),
    }
    (tmp_path / "out/manifest.jsonl").write_text(json.dumps(line))
    assert told(*words, "--json") == {"output": str(tmp_path / "out"), "videos": [line], "failed": 0}
