"""Snapshots and what else a stream does: progress, errors of callers, memories of one's own, other threads."""

import gc
import weakref
from dataclasses import dataclass, replace
from itertools import islice
from threading import Thread
from unittest.mock import Mock

import pytest
from torch import Tensor

from helpers import quiet, same, seeded
from kvpack.errors import BusyPipelineError, SnapshotError
from kvpack.memory import Attended, StateMemory, Tokens
from kvpack.snapshots.folder import SnapshotFolder
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 32,
    "num_frames": 45,
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "pt",
}


def make(stack="packforcing"):
    options = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 2} if stack == "packforcing" else {}
    return quiet(tiny_wan_pipeline()).enable_packforcing(stack, **options)


def test_progress_goes_on(tmp_path):
    def told(progress):
        return progress.chunk, progress.chunks, progress.frames, progress.video_seconds

    whole, parts = [], []
    list(make().packforcing.stream(**CALL, generator=seeded(), on_chunk=lambda each: whole.append(told(each))))
    stream = make().packforcing.stream(**CALL, generator=seeded(), on_chunk=lambda each: parts.append(told(each)))
    list(islice(stream, 3))
    stream.save(tmp_path)
    stream.close()
    list(make().packforcing.resume(tmp_path, on_chunk=lambda each: parts.append(told(each))))
    assert parts == whole


def test_a_chunk_that_nobody_was_given_is_made_again(tmp_path):
    """`on_chunk` fails behind the third chunk, before it is handed out: what is saved then would lack it."""
    whole = list(make().packforcing.stream(**CALL, generator=seeded()))

    def fail(progress):
        if progress.chunk == 2:
            stream.save(tmp_path / "never")

    stream = make().packforcing.stream(**CALL, generator=seeded(), on_chunk=fail)
    list(islice(stream, 2))
    stream.save(tmp_path / "two")
    with pytest.raises(SnapshotError, match="between two chunks only"):
        next(stream)
    with pytest.raises(SnapshotError, match="between two chunks only"):
        stream.save(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    stream.rewind(1)  # to behind the second chunk, from behind the one that nobody was given
    stream.save(tmp_path / "two")
    assert same(list(make().packforcing.resume(tmp_path / "two")), whole[2:])


@dataclass(frozen=True, eq=False)
class Pair:
    """A state of one's own."""

    tokens: Tokens
    seen: tuple[int, ...]
    extra: Tensor | None = None


@dataclass(frozen=True)
class Mine(StateMemory):
    """A memory that nobody has registered."""

    chunk_frames: int = 2
    name = "test-mine"

    def attend(self, state, chunk):
        state = state or Pair(chunk.tokens[:0], ())
        return Attended((state.tokens,), float(chunk.first_frame), state)

    def remember(self, state, chunk):
        mean = chunk.tokens.keys.float().mean() + (0 if state.extra is None else state.extra)
        tokens = state.tokens + chunk.tokens
        return replace(state, tokens=tokens[-8:], seen=(*state.seen, chunk.index), extra=mean)


def test_a_memory_of_ones_own(tmp_path):
    whole = list(make(Mine()).packforcing.stream(**CALL, generator=seeded()))
    stream = make(Mine()).packforcing.stream(**CALL, generator=seeded())
    list(islice(stream, 4))
    stream.save(tmp_path)
    stream.close()
    resumed = make(Mine()).packforcing.resume(tmp_path)
    assert resumed._run.sessions["cond"].past.states[0].seen == (0, 1, 2, 3)
    assert same(list(resumed), whole[4:])
    with pytest.raises(SnapshotError, match="the stack of the generation was"):
        make().packforcing.resume(tmp_path)


def test_two_streams_of_one_pipeline_are_saved_and_go_on(tmp_path):
    pipe = make()
    whole = [list(pipe.packforcing.stream(**CALL, generator=seeded(seed))) for seed in (1, 2)]
    streams = [pipe.packforcing.stream(**CALL, generator=seeded(seed)) for seed in (1, 2)]
    for _ in range(3):
        for index, stream in enumerate(streams):
            next(stream)
            stream.save(tmp_path / str(index))
    for stream in streams:
        stream.close()
    other = make()
    rest = [other.packforcing.resume(tmp_path / str(index)) for index in (0, 1)]
    parts = list(zip(*rest, strict=True))
    assert same([part for part, _ in parts], whole[0][3:])
    assert same([part for _, part in parts], whole[1][3:])


def test_an_interrupt_within_a_save_leaves_no_lock_though_its_traceback_lives(tmp_path, monkeypatch):
    stream = make().packforcing.stream(**CALL, generator=seeded())
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(SnapshotFolder, "require_own", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) as interrupt:
            stream.save(tmp_path)
    stream.save(tmp_path)
    assert interrupt.value.__traceback__ is not None
    stream.close()


def test_what_was_saved_or_resumed_is_freed_without_the_collector(tmp_path):
    """A circle in a writer or a reader would hold all tensors of a snapshot."""
    stream = make().packforcing.stream(**CALL, generator=seeded())
    next(stream)
    gc.disable()
    try:
        stream.save(tmp_path)
        refs = [weakref.ref(stream._run.sessions["cond"].past)]
        next(stream)
        stream.close()
        stream = make().packforcing.resume(tmp_path)
        refs.append(weakref.ref(stream._run.sessions["cond"].past))
        next(stream)
        assert not any(each() for each in refs)
    finally:
        gc.enable()


def test_another_thread_cannot_save_within_a_chunk(tmp_path):
    errors = []

    def save():
        try:
            stream.save(tmp_path)
        except BusyPipelineError as error:
            errors.append(error)

    def callback(*_):
        thread = Thread(target=save)
        thread.start()
        thread.join()
        return {}

    stream = make().packforcing.stream(**CALL, generator=seeded(), callback_on_step_end=callback)
    next(stream)
    assert len(errors) == 1
