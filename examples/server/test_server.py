"""Clients that share one pipeline get the frames of their own single runs, whatever happens to the others."""

import asyncio
import io
import json
import random
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="the server's example needs fastapi, uvicorn, httpx and prometheus-client")

import av
from fastapi import WebSocketDisconnect
from fastapi.testclient import TestClient
from hosting import Host, User, session_bytes
from server import _tidy, app_of
from typer.testing import CliRunner

import kvpack
from kvpack.cli import app
from kvpack.errors import OutputError, SnapshotWarning
from kvpack.pipeline.track import load_pipeline
from kvpack.shipped import shipped_folder

USERS = {"a red circle bouncing over dusk rings": 1, "a blue square": 2, "a green circle": 3}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone():
    """Give a pipeline of its own, for single runs."""
    pipeline = kvpack.enable(load_pipeline(shipped_folder(), torch.float32, "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def single(alone, prompt, seed, chunks, change=None):
    """Return a single run's chunks; `change` is a chunk and the prompt that it begins with."""
    noise = torch.Generator("cpu").manual_seed(seed)
    with alone.packforcing.stream(prompt=prompt, generator=noise, output_type="np") as stream:
        made = []
        for number in range(chunks):
            frames = stream.send(change[1] if change and change[0] == number else None)
            made.append(np.round(frames[0] * 255).astype(np.uint8))
    return made


@pytest.fixture
def serve(alone, tmp_path):
    """Give what begins a server for so many sessions in memory, always on the same folder."""
    each = session_bytes(alone, shipped_folder())

    def begin(capacity=3, idle_seconds=3600.0):
        host = Host(shipped_folder(), tmp_path / "sessions", capacity * each, idle_seconds=idle_seconds)
        assert host.capacity == capacity
        client = TestClient(app_of(host))
        client.host = host
        return client

    return begin


def begin(client, prompt, seed):
    answer = client.post("/sessions", json={"prompt": prompt, "seed": seed})
    assert answer.status_code == 201, answer.text
    return answer.json()["session"]


def chunk(client, name, number):
    answer = client.get(f"/sessions/{name}/chunks/{number}")
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content, np.uint8).reshape([int(each) for each in answer.headers["X-Shape"].split(",")])


def same(parts, others):
    return len(parts) == len(others) and all(np.array_equal(a, b) for a, b in zip(parts, others, strict=True))


def fail(error, *_):
    raise error


def metric(client, name):
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[-1])


def test_three_clients_at_once(alone, serve):
    with serve() as client:
        names = [begin(client, *each) for each in USERS.items()]
        with ThreadPoolExecutor(3) as threads:
            made = list(threads.map(lambda name: [chunk(client, name, number) for number in range(4)], names))
        assert metric(client, "kvpack_chunks_total") == 12
    expected = [single(alone, *each, 4) for each in USERS.items()]
    assert not same(expected[0], expected[1])
    assert all(map(same, made, expected))


def test_two_fit_and_the_third_waits_on_the_disk(alone, serve):
    with serve(capacity=2, idle_seconds=0) as client:
        names = [begin(client, *each) for each in USERS.items()]
        made = {name: [] for name in names}
        for number in range(3):
            for name in names:
                made[name].append(chunk(client, name, number))
                assert metric(client, "kvpack_sessions_in_memory") <= 2
        assert metric(client, 'kvpack_moves_total{to="memory"}') >= 6
    assert all(map(same, made.values(), (single(alone, *each, 3) for each in USERS.items())))


def test_a_session_has_room_for_the_most_that_it_ever_holds(alone):
    def planned(seconds):
        words = ["plan", "--model", str(shipped_folder()), "--size", "64x64", "--dtype", "float32", "--json"]
        return json.loads(CliRunner().invoke(app, [*words, "--seconds", str(seconds)]).stdout)["resident_kv_bytes"]

    assert session_bytes(alone, shipped_folder()) == planned(3600) > planned(120)
    endless = load_pipeline(shipped_folder(), torch.float32, "cpu").enable_packforcing("full")
    with pytest.raises(ValueError, match="full grows without end"):
        session_bytes(endless, shipped_folder())


def test_nobody_is_idle(serve):
    with serve(capacity=1) as client:
        begin(client, "a red circle", 1)
        answer = client.post("/sessions", json={"prompt": "a blue square"})
        assert answer.status_code == 503
        assert "none of them is idle" in answer.json()["detail"]


CLOCKS = {
    "the time of day jumps": {"time": lambda: random.uniform(-1e9, 1e10)},
    "no clock moves": {"monotonic": lambda: 1.0, "time": lambda: 1.0},
    "hours pass between two looks": {"monotonic": partial(next, count(0, 18000))},
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_clocks_that_jump_or_stand_still(clock, alone, serve, monkeypatch):
    """Who is idle is moved to the disk and back; the time of day says nothing of it."""
    idle = {"the time of day jumps": 3600.0, "no clock moves": 0.0, "hours pass between two looks": 3600.0}[clock]
    others = {"monotonic": time.monotonic, "time": time.time, **CLOCKS[clock]}
    monkeypatch.setattr("hosting.time", SimpleNamespace(**others))
    monkeypatch.setattr(time, "time", others["time"])
    with serve(capacity=2, idle_seconds=idle) as client:
        names = [begin(client, *each) for each in list(USERS.items())[:2]]
        made = [[chunk(client, name, 0)] for name in names]
        client.host.tidy().result()
        assert metric(client, "kvpack_sessions_in_memory") == (2 if clock == "the time of day jumps" else 0)
        for parts, name in zip(made, names, strict=True):
            parts += [chunk(client, name, number) for number in (1, 2)]
    assert all(map(same, made, (single(alone, *each, 3) for each in USERS.items())))


def test_another_prompt(alone, serve):
    with serve(capacity=1, idle_seconds=0) as client:
        name = begin(client, "a red circle", 1)
        made = [chunk(client, name, number) for number in range(2)]
        assert client.post(f"/sessions/{name}/prompt", json={"prompt": "a blue square"}).status_code == 204
        begin(client, "a green circle", 2)  # moves the first to the disk, with what it was told
        made += [chunk(client, name, number) for number in range(2, 4)]
    assert same(made, single(alone, "a red circle", 1, 4, change=(2, "a blue square")))
    assert not same(made, single(alone, "a red circle", 1, 4))


def test_sessions_are_listed_while_others_begin(serve):
    with serve() as client:
        users = client.host.users

        class Begins(User):
            stream = property(lambda _: users.setdefault("another", User("another")).stream, lambda *_: None)

        users["one"] = Begins("one")
        assert list(client.get("/sessions").json()["sessions"]) == ["one"]
        assert list(users) == ["one", "another"]
        users.clear()


def test_an_answer_that_was_lost(serve):
    """It is handed out again, also by a session that was on the disk or of another server meanwhile."""
    with serve(idle_seconds=0) as client:
        name = begin(client, "a red circle", 1)
        first = chunk(client, name, 0)
        assert same([chunk(client, name, 0)], [first])
        assert client.get(f"/sessions/{name}/chunks/7").status_code == 409
        client.host.tidy().result()
        assert metric(client, "kvpack_sessions_in_memory") == 0
        assert same([chunk(client, name, 0)], [first])
        second = chunk(client, name, 1)
        assert not same([second], [first])
    with serve() as client:
        assert same([chunk(client, name, 1)], [second])
        assert client.get(f"/sessions/{name}/chunks/0").status_code == 409
    max((client.host.folder / name).glob("*.json")).write_text("damaged")  # the snapshot before is used
    with serve() as client:
        with pytest.warns(SnapshotWarning):
            answer = client.get(f"/sessions/{name}/chunks/0")
        assert answer.status_code == 409
        assert same([chunk(client, name, 1)], [second])
    with serve() as client:
        client.delete(f"/sessions/{name}")
        assert list(client.host.folder.iterdir()) == []


def test_half_a_character_is_refused(serve):
    with serve() as client:
        name = begin(client, "a red circle", 1)
        for path in ("/sessions", f"/sessions/{name}/prompt"):
            answer = client.post(path, content=b'{"prompt":"\\ud800"}', headers={"content-type": "application/json"})
            assert answer.status_code == 422
            assert answer.json()["detail"][0]["loc"] == ["body", "prompt"]


def test_a_client_that_leaves_is_idle(serve):
    with serve(capacity=1, idle_seconds=0) as client:
        name = begin(client, "a red circle", 1)
        asked = [client.host.chunk(name) for _ in range(2)]
        assert asked[1].cancel()
        asked[0].result()
        begin(client, "a blue square", 2)


def test_an_error_ends_nothing_that_was_saved(alone, serve, monkeypatch):
    with serve() as client:
        name = begin(client, "a red circle", 1)
        made = [chunk(client, name, number) for number in range(9)]
        with monkeypatch.context() as patch:
            patch.setattr(client.host.users[name].stream._run, "decode", lambda latents: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                client.get(f"/sessions/{name}/chunks/9")
        chunk_again = client.get(f"/sessions/{name}/chunks/9")
        assert chunk_again.status_code == 409
        assert "the next is 8" in chunk_again.json()["detail"]
        made[8:] = [chunk(client, name, number) for number in range(8, 10)]
    assert same(made, single(alone, "a red circle", 1, 10))


def test_cancel(alone, serve):
    with serve() as client:
        names = [begin(client, *each) for each in USERS.items()]
        for name in names:
            chunk(client, name, 0)
        assert client.delete(f"/sessions/{names[0]}").status_code == 204
        assert client.get(f"/sessions/{names[0]}/chunks/1").status_code == 404
        assert client.delete("/sessions/..%2F..").status_code == 404
        assert not (client.host.folder / names[0]).exists()
        assert same([chunk(client, names[1], 1)], single(alone, *list(USERS.items())[1], 2)[1:])


def test_stop_and_start_again(alone, serve):
    made = {}
    with serve() as client:
        for each in USERS.items():
            name = begin(client, *each)
            made[name] = [chunk(client, name, number) for number in range(2)]
        client.post(f"/sessions/{name}/prompt", json={"prompt": "a red circle"})
    with serve() as client:
        found = client.get("/sessions").json()["sessions"]
        assert found == {name: {"chunks": 2, "in_memory": False} for name in made}
        for name, parts in made.items():
            parts += [chunk(client, name, number) for number in range(2, 4)]
    changes = [None, None, (2, "a red circle")]
    expected = [single(alone, *each, 4, change) for each, change in zip(USERS.items(), changes, strict=True)]
    assert all(map(same, made.values(), expected))


def test_a_kill_behind_another_prompt(alone, serve, tmp_path):
    """What was saved when it came is what makes the chunks again: under the prompt that they had."""
    with serve() as client:
        name = begin(client, "a red circle", 1)
        made = [chunk(client, name, number) for number in range(2)]
        client.post(f"/sessions/{name}/prompt", json={"prompt": "a blue square"})
        made += [chunk(client, name, number) for number in range(2, 4)]
        shutil.copytree(tmp_path / "sessions", tmp_path / "killed")
    shutil.rmtree(tmp_path / "sessions")
    (tmp_path / "killed").rename(tmp_path / "sessions")
    with serve() as client:
        chunks = client.get("/sessions").json()["sessions"][name]["chunks"]
        assert chunks < 4
        again = made[:chunks] + [chunk(client, name, number) for number in range(chunks, 4)]
    assert same(again, made)
    assert same(again, single(alone, "a red circle", 1, 4, change=(2, "a blue square")))


def test_a_change_that_cannot_be_saved_is_none(alone, serve, monkeypatch):
    with serve() as client:
        name = begin(client, "a red circle", 1)
        with monkeypatch.context() as patch:
            patch.setattr(client.host.users[name].stream, "save", partial(fail, OutputError("a full disk")))
            assert client.post(f"/sessions/{name}/prompt", json={"prompt": "a blue square"}).status_code == 422
        assert same([chunk(client, name, 0)], single(alone, "a red circle", 1, 1))


def test_a_session_that_cannot_be_saved_holds_no_other_up(serve, monkeypatch):
    """Neither where the idle are saved nor at the stop, both of which tell of it."""
    with pytest.raises(RuntimeError, match="a bug") as told, serve(idle_seconds=0) as client:  # noqa: PT012  # at its end
        names = [begin(client, *each) for each in USERS.items()]
        monkeypatch.setattr(client.host.users[names[0]].stream, "save", partial(fail, RuntimeError("a bug")))
        with pytest.raises(RuntimeError, match="a bug"):
            client.host.tidy().result()
        sessions = client.get("/sessions").json()["sessions"]
        assert [sessions[name]["in_memory"] for name in names] == [True, False, False]
        for name in names[1:]:
            chunk(client, name, 0)
        assert metric(client, "kvpack_sessions_in_memory") == 3
    assert told.value.__notes__[-1] == f"session {names[0]} was not saved: a bug"
    client.host.users[names[0]].stream.close()
    with serve() as client:
        sessions = client.get("/sessions").json()["sessions"]
    assert [sessions[name]["chunks"] for name in names] == [0, 1, 1]


def test_idle_sessions_are_saved_in_the_turn_behind_one_that_fails(monkeypatch, caplog):
    turns, ended = [], Future()
    ended.set_exception(RuntimeError("a bug"))

    async def sleep(_):
        if len(turns) == 2:
            raise KeyboardInterrupt

    host = SimpleNamespace(idle_seconds=2, tidy=lambda: turns.append("turn") or ended)
    monkeypatch.setattr("server.asyncio.sleep", sleep)
    with pytest.raises(KeyboardInterrupt), caplog.at_level("WARNING", "uvicorn.error"):
        asyncio.run(_tidy(host))
    assert caplog.messages == ["idle sessions could not be saved: a bug"] * 2


def test_an_mp4_and_its_end(serve):
    with serve() as client:
        name, again = (begin(client, "a red circle", 1) for _ in range(2))
        whole = client.get(f"/sessions/{name}/video.mp4?chunks=2").content
        with av.open(io.BytesIO(whole)) as video:
            pictures = [each.to_ndarray(format="rgb24") for each in video.decode(video=0)]
        frames = np.concatenate([chunk(client, again, number) for number in range(2)])
        assert len(pictures) == len(frames)
        assert np.abs(np.stack(pictures).astype(int) - frames).mean() < 8  # what x264 loses
        assert whole.count(b"moof") == len(frames)  # plays as it comes
        ended = []
        endless = threading.Thread(target=lambda: ended.append(client.get(f"/sessions/{name}/video.mp4").content))
        endless.start()
        while client.host.users[name].chunks < 4:
            time.sleep(0.01)
        client.delete(f"/sessions/{name}")
        endless.join(30)
        with av.open(io.BytesIO(ended[0])) as video:
            assert sum(1 for _ in video.decode(video=0)) >= len(frames)


def test_an_mp4_that_cannot_begin_is_refused_before_its_headers(serve, monkeypatch):
    with serve(capacity=2) as client:
        names = [begin(client, *each) for each in list(USERS.items())[:2]]
    with serve(capacity=1) as client:
        chunk(client, names[0], 0)
        full = client.get(f"/sessions/{names[1]}/video.mp4?chunks=1")
        stream = client.host.users[names[0]].stream
        monkeypatch.setattr(stream, "send", lambda *_, **__: fail(OutputError("a full disk")))
        failed = client.get(f"/sessions/{names[0]}/video.mp4?chunks=1")
        gone = client.get("/sessions/absent/video.mp4?chunks=1")
    assert [answer.status_code for answer in (full, failed, gone)] == [503, 422, 404]
    assert "none of them is idle" in full.json()["detail"]
    assert failed.json()["detail"] == "a full disk"


def test_a_websocket_plays_and_listens(alone, serve):
    with serve() as client:
        name, again = (begin(client, "a red circle", 1) for _ in range(2))
        with client.websocket_connect(f"/sessions/{name}/live") as socket:
            whole = b""
            for asked in ({}, {"prompt": "a blue square"}, {}):
                socket.send_json(asked)
                whole += socket.receive_bytes()
            client.delete(f"/sessions/{name}")
            socket.send_json({})
            with pytest.raises(WebSocketDisconnect) as refused:
                socket.receive_bytes()
        assert refused.value.code == 1008
        assert "no session" in refused.value.reason
        with client.websocket_connect(f"/sessions/{again}/live") as socket:
            socket.send_text("no JSON")
            with pytest.raises(WebSocketDisconnect):
                socket.receive_bytes()
        with client.websocket_connect(f"/sessions/{again}/live") as socket:
            socket.send_bytes(b"{}")
            with pytest.raises(WebSocketDisconnect) as refused:
                socket.receive_bytes()
        assert refused.value.reason == "a message is text, got bytes"
        assert client.host.users[again].chunks == 0
    with av.open(io.BytesIO(whole)) as video:
        pictures = np.stack([each.to_ndarray(format="rgb24") for each in video.decode(video=0)])
    wanted, other = (  # the muxer keeps the last frame until another one comes
        np.concatenate(single(alone, "a red circle", 1, 3, change))[:-1] for change in ((1, "a blue square"), None)
    )
    assert np.abs(pictures.astype(int) - wanted).mean() < 8 < np.abs(wanted.astype(int) - other).mean()
