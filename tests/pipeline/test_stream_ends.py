"""A stream ends with its block, with whoever holds it, and with the interpreter."""

import gc
import signal
import weakref

import pytest

from helpers import quiet
from kvpack.errors import SnapshotError
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 16,
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
}
OPENED = f"""
import kvpack
from kvpack.testing import tiny_wan_pipeline

pipe = tiny_wan_pipeline().enable_packforcing("self-forcing", chunk_frames=2, window_frames=4, sink_frames=1)
stream = pipe.packforcing.stream(**{CALL})
next(stream)
end = pipe._kvpack_base.maybe_free_model_hooks
type(pipe)._kvpack_base.maybe_free_model_hooks = lambda self: (end(self), print("freed"))
"""
ENDS = {
    "left open": ("", 0),
    "held by a module": ("import math; math.kept = stream", 0),
    "in a circle": ("circle = [stream]; circle.append(circle); del stream", 0),
    "running in a daemon thread": (
        "import threading, time; threading.Thread(target=list, args=[stream], daemon=True).start(); time.sleep(0.5)",
        0,
    ),
    "an exception": ("raise ZeroDivisionError('of the user')", 1),
    "an exit": ("raise SystemExit(3)", 3),
    "a signal": (  # which is ignored, and by all children, in what a shell has put into the background
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "os.kill(os.getpid(), signal.SIGINT)",
        -signal.SIGINT,
    ),
}


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline()).enable_packforcing("self-forcing", chunk_frames=2, window_frames=4, sink_frames=1)


@pytest.mark.parametrize(
    "end",
    [
        "left open",
        "held by a module",
        "running in a daemon thread",
        "an exception",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("in a circle", "an exit", "a signal")),
    ],
)
def test_an_open_stream_does_not_hold_up_the_interpreter(end, ready_python):
    code, status = ENDS[end]
    done = ready_python(OPENED + code)
    assert done.returncode == status, done.stderr
    assert done.stdout == "freed\n"
    assert "Exception ignored" not in done.stderr
    assert ("of the user" in done.stderr) == (end == "an exception")
    assert done.stderr.count("Traceback") == (end in ("an exception", "a signal"))


def test_with_ends_a_stream(pipe):
    with pipe.packforcing.stream(**CALL) as stream:
        next(stream)
        assert pipe.packforcing.sessions
    assert pipe.packforcing.sessions == {}
    with pytest.raises(StopIteration):
        next(stream)
    with pytest.raises(ZeroDivisionError):
        fail_inside(pipe.packforcing.stream(**CALL))
    assert pipe.packforcing.sessions == {}


def fail_inside(stream):
    with stream:
        next(stream)
        raise ZeroDivisionError


@pytest.mark.parametrize("with_trace", [False, True])
def test_a_closed_stream_holds_nothing_and_says_so(with_trace, pipe, tmp_path):
    if with_trace:
        pipe.packforcing.trace(tmp_path / "trace.jsonl")
    with pipe.packforcing.stream(**CALL) as stream:
        next(stream)
        past = weakref.ref(pipe.packforcing.sessions["cond"].past)
        gc.disable()
    try:
        assert past() is None
    finally:
        gc.enable()
    for use in (stream.fork, lambda: stream.save(tmp_path / "snapshots"), lambda: stream.rewind(1)):
        with pytest.raises(SnapshotError, match="the stream was closed, and holds nothing any more"):
            use()
    assert list(stream) == []
    stream.close()


@pytest.mark.parametrize("end", [lambda stream: stream.close(), lambda stream: None])
def test_a_stream_of_which_nothing_was_drawn_frees_the_models(end, pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(type(pipe)._kvpack_base, "maybe_free_model_hooks", lambda pipe: freed.append(1))
    stream = pipe.packforcing.stream(**CALL)
    assert not freed
    end(stream)
    del stream
    assert freed == [1]


def test_a_call_that_is_refused_frees_the_models(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(type(pipe)._kvpack_base, "maybe_free_model_hooks", lambda pipe: freed.append(1))
    monkeypatch.setattr(type(pipe._kvpack), "choice_for", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe(**CALL, num_frames=9)
    assert freed == [1]


def test_a_dropped_stream_ends(pipe):
    stream = pipe.packforcing.stream(**CALL)
    next(stream)
    held = [stream]
    held.append(held)
    del stream, held
    gc.collect()
    assert pipe.packforcing.sessions == {}
    assert pipe.packforcing.stats()["chunks"] == 1


class Player:
    """Holds a stream that calls it back."""

    def told(self, *given):
        return given[-1]


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "never drawn"])
@pytest.mark.parametrize("back", ["on_chunk", "callback_on_step_end", "pipeline"])
def test_a_stream_that_leads_back_to_who_holds_it_ends_with_him(back, drawn, monkeypatch):
    freed, pipe = [], quiet(tiny_wan_pipeline()).enable_packforcing("full", chunk_frames=2)
    monkeypatch.setattr(type(pipe)._kvpack_base, "maybe_free_model_hooks", lambda _: freed.append(1))
    player = Player()
    player.stream = pipe.packforcing.stream(**CALL, **({} if back == "pipeline" else {back: player.told}))
    if back == "pipeline":
        object.__setattr__(pipe, "player", player)
    if drawn:
        next(player.stream)
    run = weakref.ref(player.stream._run)
    del player
    pipe = None if back == "pipeline" else pipe
    gc.collect()
    assert run() is None
    assert freed == [1]


def test_a_stream_that_an_error_was_thrown_into_frees_the_models_once(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(type(pipe)._kvpack_base, "maybe_free_model_hooks", lambda pipe: freed.append(1))
    for drawn in (0, 1):
        stream = pipe.packforcing.stream(**CALL)
        for _ in range(drawn):
            next(stream)
        with pytest.raises(ZeroDivisionError):
            stream.throw(ZeroDivisionError())
        stream.close()
        assert len(freed) == drawn + 1
