"""Which keys and values become history: those of the clean chunk run again, or those of the last denoising step."""

from dataclasses import replace

import pytest
import torch

from helpers import archived, held, quiet, record_forwards
from kvpack.errors import InvalidOptionError
from kvpack.memory import session as session_module
from kvpack.memory.session import Session, finish_commits
from kvpack.memory.stack import Stack
from kvpack.planning.planner import plan
from kvpack.plugins.registry import registry
from kvpack.plugins.resolve import stack_from_dict
from kvpack.policies import IdentityCompressor, LowResolutionCompressor
from kvpack.testing import TINY, run_session, tiny_wan_pipeline

CALL = {
    "prompt": ["a red circle", "the blue square"],
    "height": 32,
    "width": 32,
    "num_frames": 29,  # 8 latent frames: four chunks
    "num_inference_steps": 4,
    "max_sequence_length": 8,
    "output_type": "latent",
}
OPTIONS = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 4, "compressor": "identity"}
STEPS, CHUNKS = 4, 4


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline())


@pytest.fixture
def heard(monkeypatch):
    """The forwards of a session's layer."""
    return record_forwards(monkeypatch)


def stream(pipe, guidance_scale=1.0, **changed):
    generator = [torch.Generator().manual_seed(row) for row in range(2)]
    return pipe.packforcing.stream(**{**CALL, "generator": generator, "guidance_scale": guidance_scale, **changed})


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("commit", ["rerun", "last-step"])
def test_what_is_stored_is_what_the_last_forward_made(commit, guidance_scale, pipe, heard):
    pipe.enable_packforcing("packforcing", **OPTIONS, commit=commit)
    branches = ["cond", "uncond"] if guidance_scale > 1 else ["cond"]
    last = {}
    for chunk, _ in enumerate(stream(pipe, guidance_scale)):
        sessions = pipe.packforcing.sessions
        assert list(sessions) == branches
        for branch, session in sessions.items():
            for layer in range(session.geometry.layers):
                forwards = heard(session, layer)
                assert len(forwards) == (chunk + 1) * (STEPS + (commit == "rerun"))
                _, *last[branch, layer, chunk] = forwards[-1]
                for given, wanted in zip(held(session)[-1][1][layer], last[branch, layer, chunk], strict=True):
                    assert torch.equal(given, wanted)
                if chunk == CHUNKS - 1:  # chunks 1 and 2 have left recent
                    for index, pair in enumerate(archived(session, layer), start=1):
                        keys, values = last[branch, layer, index]
                        assert torch.equal(pair[0], keys)
                        assert torch.equal(pair[1], values)
                    assert len(archived(session, layer)) == 2


@pytest.mark.parametrize(
    ("commit", "compressor", "forwards"),
    [
        ("rerun", "identity", [5, 5, 5, 5]),
        ("last-step", "identity", [4, 4, 4, 4]),
        ("rerun", "lr", [5, 5, 5, 5]),  # the twin of a chunk that will be compressed rides in the commit's
        ("last-step", "lr", [4, 5, 5, 5]),
    ],
)
def test_a_forward_in_five_is_saved(commit, compressor, forwards, pipe):
    pipe.enable_packforcing("packforcing", **{**OPTIONS, "compressor": compressor}, commit=commit)
    counts, seen = [], []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        for frames in stream(pipe):
            assert bool(frames.isfinite().all())
            counts.append(len(seen))
            seen.clear()
    finally:
        handle.remove()
    assert counts == forwards
    assert pipe.packforcing.stats()["archive_blocks"] == 2


def test_the_default_reruns_and_the_choice_changes_the_video(pipe):
    videos = {}
    for commit in (None, "rerun", "last-step"):
        pipe.enable_packforcing("packforcing", **OPTIONS, **({"commit": commit} if commit else {}))
        videos[commit] = torch.cat(list(stream(pipe)), dim=2)
    assert torch.equal(videos[None], videos["rerun"])
    assert torch.equal(videos["last-step"][:, :, :2], videos["rerun"][:, :, :2])
    assert not torch.equal(videos["last-step"], videos["rerun"])


def test_an_interrupted_chunk_is_not_committed(pipe):
    pipe.enable_packforcing("packforcing", **OPTIONS, commit="last-step")

    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = pipe.packforcing.sessions["cond"].frames == 2 and step == 1
        return tensors

    chunks = [pipe.packforcing.sessions["cond"].frames for _ in stream(pipe, callback_on_step_end=callback)]
    assert chunks == [2, 2]


def test_a_branch_that_guidance_left_out_of_the_last_step_runs_again(pipe, heard):
    pipe.enable_packforcing("packforcing", **OPTIONS, commit="last-step")

    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0  # for the steps to come
        return tensors

    made = iter(stream(pipe, 4.0, callback_on_step_end=callback))
    next(made)
    sessions = pipe.packforcing.sessions
    assert [len(heard(sessions[branch])) for branch in ("cond", "uncond")] == [4, 1 + 1]
    assert sessions["cond"].frames == sessions["uncond"].frames == 2
    made.close()


@pytest.mark.parametrize("name", ["packforcing", "deep-forcing", "longlive", "mixed-windows"])
@pytest.mark.parametrize("interruption", [ValueError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_commit_that_ends_in_a_layer_of_a_branch_changes_neither_branch(name, interruption, monkeypatch):
    """Though layers of a memory of values have let go of what they attended: the chunk is made again."""
    branches = [Session(registry().stack(name, {}), TINY) for _ in range(2)]
    for seed, branch in enumerate(branches):
        run_session(branch, 9, seed=seed)
    plain, pasts = [branch.snapshot() for branch in branches], [branch.past for branch in branches]
    chunk, remember, calls = [], type(branches[0].stack).remember_all, []
    monkeypatch.setattr(session_module, "finish_commits", lambda sessions: chunk.extend(sessions))
    for seed, branch in enumerate(branches):
        run_session(branch, 1, seed=seed + 5)
    monkeypatch.undo()

    def fails(stack, committed):
        def until_the_second():
            for each in committed:
                calls.append(each)
                if len(calls) == TINY.layers + 2:
                    raise interruption("in the second layer of the second branch")
                yield each

        return remember(stack, until_the_second())

    with monkeypatch.context() as patch:
        patch.setattr(type(branches[0].stack), "remember_all", fails)
        with pytest.raises(interruption):
            finish_commits(chunk)
    assert [branch.past for branch in branches] == pasts
    again, wanted = ([run_session(each, 3, seed=7) for each in both] for both in (branches, plain))
    assert all(
        torch.equal(a, b) for one, other in zip(again, wanted, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_half_a_forward_is_never_committed():
    stack = registry().stack("packforcing", {"commit": "last-step", "topk": 2})
    session = Session(stack, TINY)
    run_session(session, 6)
    before = session.past
    session.denoise(0)
    session.layers[0].attend(*torch.zeros(3, 1, 80, TINY.heads, TINY.head_dim), lambda q, k, v: q)
    with pytest.raises(RuntimeError, match="must follow"):
        session.finish_commit()
    assert session.past is before


def test_a_chunk_is_committed_once():
    session = Session(registry().stack("packforcing", {"commit": "last-step"}), TINY)
    run_session(session, 2)
    session.denoise(1)
    with pytest.raises(RuntimeError, match="must follow"):
        session.finish_commit()
    assert session.frames == 8


def test_a_plan_counts_one_forward_less():
    stack = registry().stack("packforcing", {})
    figures = [
        plan(TINY, replace(stack, commit=commit), 40, flops=lambda query, attended: 1000).flops_per_chunk
        for commit in ("rerun", "last-step")
    ]
    assert figures == [5000, 4000]
    last = replace(stack, commit="last-step")
    assert plan(TINY, last, 40).archive_kv_bytes == plan(TINY, stack, 40).archive_kv_bytes


@pytest.mark.parametrize("name", ["packforcing", "self-forcing", "full"])
def test_every_stack_takes_it_and_gives_it_back_as_data(name):
    stack = registry().stack(name, {"commit": "last-step"})
    assert stack.commit == "last-step"
    assert stack.to_dict()["commit"] == "last-step"
    assert stack_from_dict(stack.to_dict()) == stack
    old = {key: value for key, value in stack.to_dict().items() if key not in ("commit", "share_selection")}
    assert stack_from_dict(old).commit == "rerun"


def test_a_wrong_word_is_refused():
    stack = registry().stack("packforcing", {})
    with pytest.raises(InvalidOptionError, match="commit must be one of rerun, last-step, got 'never'"):
        replace(stack, commit="never")
    assert isinstance(replace(stack, compressor=LowResolutionCompressor(), commit="last-step"), Stack)
    assert isinstance(replace(stack, compressor=IdentityCompressor(), commit="last-step"), Stack)
