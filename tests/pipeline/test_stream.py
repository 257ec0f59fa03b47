"""Streams: the same video chunk by chunk, endless, side by side, left early."""

import inspect
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

import kvpack
from helpers import quiet, seeded
from kvpack.errors import InvalidOptionError, UnsupportedPipelineError
from kvpack.generation.run import Run
from kvpack.pipeline.stream import Stream
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 32,
    "width": 48,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
}
SIZES = {"chunk_frames": 3, "sink_frames": 3, "recent_frames": 3}
STACKS = {
    "full": ("full", {"chunk_frames": 3}),
    "window": ("self-forcing", {"chunk_frames": 3, "window_frames": 6, "sink_frames": 1}),
    "pool": ("packforcing", {**SIZES, "topk": 1, "sink_frames": 2, "reindexer": "contiguous"}),
    "lr": ("packforcing", {**SIZES, "topk": 1, "compressor": "lr"}),
    "fit": ("packforcing", {**SIZES, "topk": 2}),
}


def arguments(seed=0, **changed):
    return {"generator": seeded(seed), **CALL, **changed}


@pytest.fixture
def pipe():
    name, options = STACKS["window"]
    return quiet(tiny_wan_pipeline()).enable_packforcing(name, **options)


def is_stock(pipe):
    transformer = pipe.transformer
    return (
        all(type(block.attn1.processor).__name__ == "WanAttnProcessor" for block in transformer.blocks)
        and "forward" not in vars(transformer)
        and not transformer._forward_pre_hooks
        and not transformer.patch_embedding._forward_hooks
        and not transformer._diffusers_hook.hooks
    )


@pytest.mark.parametrize("stack", [pytest.param(s, marks=pytest.mark.slow) if s == "fit" else s for s in STACKS])
def test_streamed_equals_whole(stack, pipe):
    name, options = STACKS[stack]
    pipe.enable_packforcing(name, **options)
    changed = {"num_frames": 49, "prompt": ["a red circle", "the blue square"], "output_type": "pt"}
    whole = pipe(**arguments(guidance_scale=4.0, **changed)).frames
    parts = list(pipe.packforcing.stream(**arguments(guidance_scale=4.0, **changed)))
    assert [part.shape[1] for part in parts] == [9, 12, 12, 12, 4]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("output_type", ["latent", "np", "pil"])
def test_every_output_type_streams(output_type, pipe):
    whole = pipe(**arguments(num_frames=25, output_type=output_type)).frames
    parts = list(pipe.packforcing.stream(**arguments(num_frames=25, output_type=output_type)))
    if output_type == "latent":
        assert torch.equal(torch.cat(parts, dim=2), whole)
    elif output_type == "np":
        assert np.array_equal(np.concatenate(parts, axis=1), whole)
    else:
        assert [image.tobytes() for part in parts for image in part[0]] == [image.tobytes() for image in whole[0]]


def test_the_default_output_is_that_of_the_call(pipe):
    (part,) = pipe.packforcing.stream(**arguments(num_frames=5))
    assert isinstance(part, np.ndarray)
    assert part.shape == (1, 5, 32, 48, 3)


@pytest.mark.parametrize("stack", ["window", *(pytest.param(each, marks=pytest.mark.slow) for each in ("pool", "lr"))])
def test_without_end(stack, pipe):
    name, options = STACKS[stack]
    pipe.enable_packforcing(name, **options)
    stream = pipe.packforcing.stream(**arguments(output_type="pt"))
    parts = [next(stream) for _ in range(5)]
    assert pipe.packforcing.stats()["chunks"] == 5
    stream.close()
    whole = pipe(**arguments(num_frames=57, output_type="pt")).frames
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_arguments_by_their_places(pipe):
    call = ("a red circle", None, 32, 48, 25, 2, 1.0)
    named = {"generator": seeded(), "output_type": "latent", "max_sequence_length": 8}
    whole = pipe(*call, **named).frames
    parts = list(pipe.packforcing.stream(*call, **{**named, "generator": seeded()}))
    assert torch.equal(torch.cat(parts, dim=2), whole)
    with pytest.raises(TypeError, match="multiple values for argument 'prompt'"):
        pipe.packforcing.stream(*call, **CALL)
    with pipe.packforcing.stream(*call[:4]) as stream:
        assert stream.chunks is None


def test_given_latents_end_a_stream(pipe):
    noise = torch.randn(1, 16, 7, 4, 6, generator=seeded())
    parts = list(pipe.packforcing.stream(latents=noise, output_type="latent", **CALL))
    assert [part.shape[2] for part in parts] == [3, 3, 1]


def test_the_pipeline_is_stock_between_chunks(pipe):
    for _ in pipe.packforcing.stream(**arguments(num_frames=25)):
        assert is_stock(pipe)
        assert set(pipe.packforcing.sessions) == {"cond"}
    assert pipe.packforcing.sessions == {}


def interleaved(*streams):
    """Chunks of several streams, one of each in turn."""
    parts = [[] for _ in streams]
    for chunks in zip(*streams, strict=True):
        for part, chunk in zip(parts, chunks, strict=True):
            part.append(chunk)
    return [torch.cat(part, dim=1) for part in parts]


@pytest.mark.parametrize("scheduler", [None, kvpack.FlowMatchFewStepScheduler()])
def test_two_streams_at_once(scheduler, pipe):
    steps = 2
    if scheduler is not None:
        pipe.scheduler, steps = scheduler, 4
    calls = [
        {"prompt": "a red circle", "guidance_scale": 1.0, "num_frames": 37},
        {"prompt": "the blue square", "guidance_scale": 3.0, "num_frames": 37, "height": 16},
    ]
    calls = [{"output_type": "pt", "num_inference_steps": steps, **call} for call in calls]
    wanted = [pipe(**arguments(seed, **call)).frames for seed, call in enumerate(calls)]
    given = interleaved(*(pipe.packforcing.stream(**arguments(seed, **call)) for seed, call in enumerate(calls)))
    assert all(torch.equal(*each) for each in zip(given, wanted, strict=True))


@pytest.mark.parametrize("between", ["sibling", "call", "interrupted"])
def test_another_generation_between_two_chunks(between, pipe):
    call = arguments(num_frames=37, output_type="pt")
    wanted = pipe(**call).frames
    other = WanPipeline.from_pipe(pipe) if between == "sibling" else pipe
    other.set_progress_bar_config(disable=True)
    alone = other(**arguments(7, num_frames=13, output_type="pt")).frames

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    parts = []
    for part in pipe.packforcing.stream(**arguments(num_frames=37, output_type="pt")):
        parts.append(part)
        callback = stop if between == "interrupted" else None
        again = other(**arguments(7, num_frames=13, output_type="pt", callback_on_step_end=callback)).frames
        assert between == "interrupted" or torch.equal(again, alone)
    assert torch.equal(torch.cat(parts, dim=1), wanted)


@pytest.mark.parametrize("name", ["packforcing", "h2o"])
def test_inference_mode_for_some_chunks(name, pipe, tmp_path):
    """In which what is made cannot be written outside of it: the memory, drawn or resumed."""
    pipe.enable_packforcing(name, **(STACKS["pool"][1] if name == "packforcing" else {"chunk_frames": 3}))
    call = {"num_frames": 121, "output_type": "latent"}
    whole = pipe(**arguments(**call)).frames
    with torch.inference_mode():
        stream = pipe.packforcing.stream(**arguments(**call))
        made = [next(stream) for _ in range(3)]
        stream.save(tmp_path)
        resumed = pipe.packforcing.resume(tmp_path)
        assert torch.is_inference_mode_enabled()
    made += [next(stream) for _ in range(3)]
    other = stream.fork()
    with torch.inference_mode():
        assert torch.equal(torch.cat([*made, *other], dim=2), whole)
    assert torch.equal(torch.cat([*made, *stream], dim=2), whole)
    assert torch.equal(torch.cat([*made[:3], *resumed], dim=2), whole)
    assert not made[0].is_inference()


def test_left_early(pipe):
    wanted = pipe(**arguments(num_frames=25, output_type="pt")).frames
    stream = pipe.packforcing.stream(**arguments(output_type="pt"))
    first = next(stream)
    stream.close()
    assert is_stock(pipe)
    assert pipe.packforcing.sessions == {}
    assert pipe.packforcing.stats()["chunks"] == 1
    assert torch.equal(first, wanted[:, :9])
    pipe.packforcing.stream(**arguments()).close()  # never started
    assert torch.equal(pipe(**arguments(num_frames=25, output_type="pt")).frames, wanted)


def test_an_exception_in_a_stream(pipe):
    calls = 0

    def callback(pipe, step, timestep, tensors):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError("callback")
        return tensors

    wanted = pipe(**arguments(num_frames=25, output_type="pt")).frames
    stream = pipe.packforcing.stream(**arguments(output_type="pt", callback_on_step_end=callback))
    next(stream)
    with pytest.raises(ZeroDivisionError, match="callback"):
        next(stream)
    assert is_stock(pipe)
    with pytest.raises(StopIteration):
        next(stream)
    assert torch.equal(pipe(**arguments(num_frames=25, output_type="pt")).frames, wanted)


def test_interrupted_in_a_stream(pipe, caplog):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = pipe.packforcing.sessions["cond"].frames == 3
        return tensors

    parts = list(pipe.packforcing.stream(**arguments(output_type="latent", callback_on_step_end=stop)))
    assert [part.shape[2] for part in parts] == [3, 3]
    assert caplog.messages == ["the pipeline was interrupted; the video ends at 1.31 s (21 frames)"]


def test_disabled_under_an_open_stream(pipe):
    stream = pipe.packforcing.stream(**arguments())
    next(stream)
    pipe.disable_packforcing()
    assert type(pipe) is WanPipeline
    with pytest.raises(UnsupportedPipelineError, match="disabled while a stream was open"):
        next(stream)
    assert is_stock(pipe)


@pytest.mark.parametrize(
    "use",
    [next, lambda stream: stream.save("unused"), lambda stream: stream.fork(), lambda stream: stream.rewind(0)],
    ids=["next", "save", "fork", "rewind"],
)
def test_disabled_before_the_first_chunk(use, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream = pipe.packforcing.stream(**arguments())
    stream.save("kept")
    pipe.disable_packforcing()
    with pytest.raises(UnsupportedPipelineError, match="disabled while a stream was open"):
        use(stream)


def test_a_prompt_for_a_closed_stream_changes_nothing(pipe):
    stream = pipe.packforcing.stream(**arguments())
    next(stream)
    stream.close()
    with patch.object(Run, "encode", side_effect=AssertionError), pytest.raises(StopIteration):
        stream.send("another", cut=True)


def test_a_cut_is_true_or_false(pipe):
    with pipe.packforcing.stream(**arguments()) as stream:
        next(stream)
        with pytest.raises(InvalidOptionError, match="cut must be True or False, got 'no'"):
            inspect.unwrap(Stream.send)(stream, "another", cut="no")
        next(stream)


def test_sessions_are_those_of_the_stream_drawn_from_last(pipe):
    def look(pipe, step, timestep, tensors):
        seen.append(pipe.packforcing.sessions["cond"].frames)
        return tensors

    one, other = (pipe.packforcing.stream(**arguments(callback_on_step_end=look)) for _ in range(2))
    seen = []
    for stream in (one, one, other, one):
        next(stream)
    assert sorted(set(seen)) == [0, 3, 6]  # the third chunk of the one saw its own past, not the other's
    other.close()
    next(one)
    assert pipe.packforcing.stats()["chunks"] == 4


def test_another_stack_under_an_open_stream(pipe):
    """A stream keeps the stack that it was begun with."""
    wanted = pipe(**arguments(num_frames=37, output_type="pt")).frames
    stream = pipe.packforcing.stream(**arguments(num_frames=37, output_type="pt"))
    parts = [next(stream)]
    pipe.enable_packforcing("full", chunk_frames=1)
    parts += list(stream)
    assert torch.equal(torch.cat(parts, dim=1), wanted)


@pytest.mark.parametrize("stack", ["window", "pool", "lr"])
def test_memory_does_not_grow(stack, pipe):
    name, options = STACKS[stack]
    pipe.enable_packforcing(name, **options, **({} if stack == "window" else {"archive_blocks": 2}))
    stream = pipe.packforcing.stream(**arguments(output_type="latent", height=16, num_inference_steps=1))
    resident = []
    for _ in range(11):
        next(stream)
        resident.append(pipe.packforcing.stats()["resident_bytes"])
    stream.close()
    assert len(set(resident[6:])) == 1


def test_errors_come_before_the_first_chunk(pipe):
    with pytest.raises(ValueError, match="divisible by 16"):
        pipe.packforcing.stream(**arguments(height=17))
