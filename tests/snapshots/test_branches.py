"""Two futures of one past: each is what it would have been alone."""

import gc
import json
import os
import signal
import weakref
from itertools import islice

import pytest
import torch

from helpers import SMALL, SMALL_CALL, quiet, row_seeds, same, seeded
from kvpack.errors import InvalidOptionError, OutputError, SnapshotError
from kvpack.plugins.registry import registry
from kvpack.shipped import demo_stack
from kvpack.testing import (
    tiny_anyflow_far_pipeline,
    tiny_sana_wm_refiner,
    tiny_skyreels_v2_pipeline,
    tiny_wan_pipeline,
)

CALL = {**SMALL_CALL, "num_frames": 61}


def make(pipe=None):
    return quiet(pipe or tiny_wan_pipeline()).enable_packforcing("packforcing", **SMALL)


def taken(stream, count):
    return list(islice(stream, count))


@pytest.mark.parametrize("name", registry().names("stack"))
def test_both_futures_of_every_stack(name):
    pipe = quiet(tiny_wan_pipeline()).enable_packforcing(demo_stack(name, **(SMALL if name == "packforcing" else {})))
    call = {**CALL, "num_frames": 4 * 9 * pipe.packforcing.stack.chunk_frames - 3, "num_inference_steps": 1}
    whole = list(pipe.packforcing.stream(**call, generator=seeded()))
    stream = pipe.packforcing.stream(**call, generator=seeded())
    first = taken(stream, 6)
    other = stream.fork()
    assert same([*first, *taken(stream, 1)], whole[:7])
    assert same(taken(other, 2), whole[6:8])  # beside each other
    assert same(list(stream), whole[7:])
    assert same(list(other), whole[8:])


FAMILIES = {
    "skyreels": (tiny_skyreels_v2_pipeline, {"height": 32}),
    "anyflow": (tiny_anyflow_far_pipeline, {"height": 32, "num_frames": 81}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    make_pipe, changed = FAMILIES[name]
    pipe = quiet(make_pipe()).enable_packforcing("packforcing", topk=2, sink_frames=3, archive_blocks=2)
    call = {**CALL, **changed, "prompt": ["a red circle", "night"]}
    whole = list(pipe.packforcing.stream(**call, generator=row_seeds()))
    stream = pipe.packforcing.stream(**call, generator=row_seeds())
    taken(stream, 3)
    other = stream.fork()
    assert same(taken(stream, 1), whole[3:4])
    assert same(list(other), whole[3:])
    assert same(list(stream), whole[4:])


def test_the_refiner():
    pipe = quiet(tiny_sana_wm_refiner()).enable_packforcing("sana-wm")
    call = {"sana_latent": torch.randn(1, 4, 25, 2, 3, generator=seeded()), "prompt": "red", "fps": 16.0}
    call["output_type"] = "latent"
    whole = list(pipe.packforcing.stream(**call))
    stream = pipe.packforcing.stream(**call)
    taken(stream, 3)
    other = stream.fork()
    assert same(list(stream), whole[3:])
    assert same(list(other), whole[3:])


def test_another_prompt_and_seed_in_a_branch():
    """Equal to a stream that was sent the prompt, and drew that noise, at the same place."""
    pipe = make()

    def alone():
        stream = pipe.packforcing.stream(**CALL, generator=seeded())
        taken(stream, 3)
        stream._run.call["generator"].manual_seed(5)
        return [stream.send("the green square", cut=True), *stream]

    expected = alone()
    stream = pipe.packforcing.stream(**CALL, generator=seeded())
    whole = list(pipe.packforcing.stream(**CALL, generator=seeded()))
    taken(stream, 3)
    other = stream.fork(seed=5, prompt="the green square", cut=True)
    assert same(list(other), expected)
    assert same(list(stream), whole[3:])
    assert not torch.equal(expected[0], whole[3])


def test_a_schedule_to_come_is_in_both():
    call = {**CALL, "prompt": [(0, "a red circle"), (2.5, "the blue square")]}
    pipe = make()
    whole = list(pipe.packforcing.stream(**call, generator=seeded()))
    stream = pipe.packforcing.stream(**call, generator=seeded())
    taken(stream, 2)
    other = stream.fork()
    assert same(list(stream), whole[2:])
    assert same(list(other), whole[2:])


def test_what_one_futures_callback_replaces_is_its_own():
    """Embeddings of a schedule to come are the same tensors in both."""
    told = []

    def callback(pipe, step, timestep, tensors):
        return {"prompt_embeds": -2 * tensors["prompt_embeds"]} if told else {}

    schedule = {**CALL, "prompt": [(0, "a red circle"), (1.5, "the blue square")]}
    given = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    stream = make().packforcing.stream(**schedule, **given, generator=seeded())
    taken(stream, 2)
    one, other = stream.fork(), stream.fork()
    expected = list(one)
    told.append(True)
    changed = list(stream)
    told.clear()
    assert not torch.equal(changed[-1], expected[-1])
    assert same(list(other), expected)


def test_nothing_is_copied_until_it_is_written():
    pipe = make()
    stream = pipe.packforcing.stream(**CALL, generator=seeded())
    taken(stream, 4)
    other = stream.fork()
    for session, fork in zip(stream._run.sessions.values(), other._run.sessions.values(), strict=True):
        for mine, its in zip(session.past.states, fork.past.states, strict=True):
            assert [kept.block for kept in mine.whole] == [kept.block for kept in its.whole]
            assert [id(each) for each in mine.archive.keys] == [id(each) for each in its.archive.keys]


# Blocks that lie in order, and, once an archived one is smaller than the others, apart.
@pytest.mark.parametrize("sizes", [SMALL, {**SMALL, "sink_frames": 1, "archive_blocks": 8}], ids=["equal", "unequal"])
@pytest.mark.parametrize("closes", [True, False])
def test_a_future_that_ends_leaves_no_arena_to_the_others(closes, sizes):
    """Neither the elder nor the younger: what they share moves at the others' next chunk."""
    pipe = quiet(tiny_wan_pipeline()).enable_packforcing("packforcing", **sizes)
    whole = list(pipe.packforcing.stream(**CALL, generator=seeded()))
    stream, arenas, shared = pipe.packforcing.stream(**CALL, generator=seeded()), [], []
    made = taken(stream, 2)
    for _ in range(3):
        ended = [stream, stream.fork(seed=5)]
        stream = stream.fork()
        taken(ended[1], 1)
        for each in ended:
            arenas += [weakref.ref(cache.arena) for cache in each._run.sessions["cond"].caches]
            if closes:
                each.close()
        del ended, each
        gc.collect()
        shared.append(arenas[-1]() is not None)
        made += taken(stream, 1)
        assert [arena for arena in arenas if arena() is not None] == []
    assert (len(arenas), shared) == (12, [True, True, sizes is SMALL])  # apart, no block lies in an arena any more
    assert same([*made, *stream], whole)


def test_seeds_are_as_many_as_generators(tmp_path):
    pipe = make()
    stream = pipe.packforcing.stream(**{**CALL, "prompt": ["a", "night"]}, generator=row_seeds())
    next(stream)
    with pytest.raises(InvalidOptionError, match="the call has 2 generators; give as many seeds, got 3"):
        stream.fork(seed=3)
    stream.fork(seed=[3, 4])
    stream = pipe.packforcing.stream(**CALL, generator=seeded())
    next(stream)
    with pytest.raises(InvalidOptionError, match="the call has one generator"):
        stream.fork(seed=[3, 4])


def test_rewound_to_a_kept_snapshot(tmp_path):
    pipe = make()
    whole = list(pipe.packforcing.stream(**CALL, generator=seeded()))
    stream = pipe.packforcing.stream(**CALL, generator=seeded())
    with pytest.raises(SnapshotError, match=r"none; save\(\) keeps the last two"):
        stream.rewind(1)
    for count in (2, 2, 1):
        taken(stream, count)
        if count == 2:
            stream.save(tmp_path, note=count)
    with pytest.raises(
        SnapshotError, match=r"no snapshot is kept 2 chunks back; those that are: rewind\(3\), rewind\(1\)"
    ):
        stream.rewind(2)
    stream.rewind(3)
    assert stream.note == 2
    assert same(list(stream), whole[2:])
    stream.rewind(6, seed=9, prompt="the green square")
    changed = taken(stream, 2)
    assert not torch.equal(changed[0], whole[2])
    stream.save(tmp_path)
    rest = list(stream)
    stream.close()
    resumed = make().packforcing.resume(tmp_path)
    assert same(list(resumed), rest)
    resumed.close()


def test_forks_are_saved_apart(tmp_path):
    pipe = make()
    stream = pipe.packforcing.stream(**CALL, generator=seeded())
    taken(stream, 3)
    other = stream.fork(seed=2)
    for name, each in (("a", stream), ("b", other)):
        next(each)
        each.save(tmp_path / name)
        each.save(tmp_path / name)
    with pytest.raises(OSError, match="being written by another"):
        stream.save(tmp_path / "b")
    with pytest.raises(SnapshotError):  # the folder of before is still its own, another one nobody's
        stream.save(tmp_path / "c", note=object())
    other.save(tmp_path / "c")
    with pytest.raises(OSError, match="being written by another"):
        other.save(tmp_path / "a")
    stream.save(tmp_path / "a")
    other.save(tmp_path / "b")
    for name, each in (("a", stream), ("b", other)):
        expected = list(each)
        each.close()
        assert same(list(make().packforcing.resume(tmp_path / name)), expected)


@pytest.mark.parametrize("pattern", ["*", "*.json"])
def test_snapshots_that_somebody_removed_are_written_again(pattern, tmp_path):
    stream = make().packforcing.stream(**CALL, generator=seeded())
    for _ in range(4):
        next(stream)
        stream.save(tmp_path)
    for path in tmp_path.glob(pattern):
        if path.name != "lock":
            path.unlink()
    next(stream)
    stream.save(tmp_path)
    next(stream)
    stream.save(tmp_path)
    expected = list(stream)
    stream.close()
    assert same(list(make().packforcing.resume(tmp_path)), expected)


def test_a_process_that_was_forked_meanwhile_keeps_no_folder(tmp_path):
    stream = make().packforcing.stream(**CALL, generator=seeded())
    stream.save(tmp_path)
    readable, writable = os.pipe()
    if not (child := os.fork()):
        try:
            del stream  # a fork's copy lets go of nothing that is this process's
            gc.collect()
            os.write(writable, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writable)
    try:
        with os.fdopen(readable, "rb") as pipe:
            assert pipe.read(1)
        with pytest.raises(OSError, match="being written by another"):
            make().packforcing.resume(tmp_path).save(tmp_path)
        stream.close()
        make().packforcing.resume(tmp_path).save(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_rewind_that_fails_changes_nothing(tmp_path):
    """Neither the note nor torch's own generators, from which noise comes here."""
    stream = make().packforcing.stream(**CALL)
    for note in (1, 2):
        next(stream)
        stream.save(tmp_path, note)
    state = torch.get_rng_state()
    for wrong in ({"seed": [1, 2]}, {"prompt": ["one", "two"]}):
        with pytest.raises(InvalidOptionError):
            stream.rewind(1, **wrong)
        assert stream.note is None
        assert torch.equal(torch.get_rng_state(), state)
    stream.rewind(1)
    assert stream.note == 1
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_folder_by_another_name(tmp_path, monkeypatch):
    stream = make().packforcing.stream(**CALL, generator=seeded())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in ("kept", tmp_path / "here" / "kept", "../here/kept"):
        next(stream)
        stream.save(path)
    monkeypatch.chdir(tmp_path)  # where "kept" is another folder
    next(stream)
    stream.save("kept")
    assert [len(list(each.glob("snapshot-*.json"))) for each in (tmp_path / "here" / "kept", tmp_path / "kept")] == [
        2,
        1,
    ]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"archive_blocks": 4}, "was {archive_blocks: 3}, but here it is {archive_blocks: 4}; enable"),
    ],
)
def test_another_stack_is_refused_by_what_differs(other, said, tmp_path):
    stream = make().packforcing.stream(**CALL, generator=seeded())
    next(stream)
    stream.save(tmp_path)
    pipe = quiet(tiny_wan_pipeline()).enable_packforcing("packforcing", **{**SMALL, **other})
    with pytest.raises(SnapshotError, match=said):
        pipe.packforcing.resume(tmp_path)


@pytest.mark.parametrize("note", ["a" * 2**26, [[]] * 2**19], ids=["long", "many"])
def test_a_note_that_could_not_be_resumed(note, tmp_path):
    pipe = make()
    with pipe.packforcing.stream(**CALL, generator=seeded()) as stream:
        next(stream)
        stream.save(tmp_path, note="short")
        before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
        with pytest.raises(OutputError, match="shorten the note"):
            stream.save(tmp_path, note)
        assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
    assert pipe.packforcing.resume(tmp_path).note == "short"


@pytest.mark.parametrize("note", [object(), {"a": float("nan")}, {1j: 2}], ids=["object", "nan", "key"])
def test_a_note_that_is_no_json(note, tmp_path):
    stream = make().packforcing.stream(**CALL, generator=seeded())
    next(stream)
    with pytest.raises(SnapshotError, match="note must be what JSON takes"):
        stream.save(tmp_path, note)
    assert [each.name for each in tmp_path.iterdir()] == ["lock"]


def test_the_trace_is_that_of_the_stream_that_began_last(tmp_path):
    pipe, path = make(), tmp_path / "trace.jsonl"
    pipe.packforcing.trace(path)
    stream = pipe.packforcing.stream(**CALL, generator=seeded())
    taken(stream, 2)
    other = stream.fork(prompt="something else which is longer")
    for each in (other, stream, other, stream, stream, other):
        next(each)
    head, *lines = map(json.loads, path.read_text().splitlines())
    assert head["stack"] == "packforcing"
    assert [(line["chunk"], line["first_frame"]) for line in lines] == [(2, 4), (3, 6), (4, 8)]


def test_a_refused_resume_leaves_what_the_budget_chose(tmp_path):
    stream = make().packforcing.stream(**CALL, generator=seeded())
    next(stream)
    stream.save(tmp_path)
    pipe = quiet(tiny_wan_pipeline()).enable_packforcing("packforcing", **{**SMALL, "archive_blocks": 4}, budget_gb=1)
    with pytest.raises(SnapshotError, match="archive_blocks"):
        pipe.packforcing.resume(tmp_path)
    assert pipe.packforcing.choice is None
