"""Two threads on one pipeline, or on two that share a transformer: one generates, the other is told in a line."""

import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from unittest.mock import Mock

import pytest
import torch
from diffusers import WanPipeline

from helpers import quiet, seeded
from kvpack.errors import BusyPipelineError, InvalidOptionError
from kvpack.generation import threads
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 32,
    "num_frames": 25,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
WINDOW = {"chunk_frames": 2, "window_frames": 4, "sink_frames": 1}
MESSAGE = "one thread at a time: make a pipeline of its own for each thread"


def enabled():
    return quiet(tiny_wan_pipeline()).enable_packforcing("self-forcing", **WINDOW)


def generate(pipe, **call):
    return pipe(**{**CALL, "generator": seeded(), **call}).frames


def traces(pipe):
    """Whatever kvpack could leave in a transformer."""
    model = pipe.transformer
    processors = [type(each.processor).__name__ for block in model.blocks for each in (block.attn1, block.attn2)]
    return processors, sorted(vars(model)), len(model._forward_pre_hooks), len(model._forward_hooks)


class Paused:
    """A generation in another thread that stands still in its first step for the length of a block."""

    def __init__(self, pipe):
        self.pipe, self.reached, self.go_on = pipe, threading.Event(), threading.Event()

    def __enter__(self):
        self.pool = ThreadPoolExecutor(1)
        self.made = self.pool.submit(generate, self.pipe, callback_on_step_end=self.pause)
        assert self.reached.wait(60)
        return self

    def __exit__(self, *error):
        self.go_on.set()
        self.made.exception()
        self.pool.shutdown()

    def pause(self, pipe, step, timestep, tensors):
        self.reached.set()
        assert self.go_on.wait(60)
        return tensors


@pytest.fixture
def pipe():
    return enabled()


def streamed(pipe):
    return next(pipe.packforcing.stream(**CALL))


def shared(pipe):
    """An enabled pipeline of its own over the same transformer."""
    return quiet(WanPipeline(**pipe.components)).enable_packforcing("full", chunk_frames=2)


def stock(pipe):
    """A stock pipeline over the same transformer, with the scheduler of its own that threads need in diffusers, too."""
    return quiet(WanPipeline(**{**pipe.components, "scheduler": deepcopy(pipe.scheduler)}))


OTHERS = {
    "a call": lambda pipe: generate(pipe),
    "a stream": streamed,
    "a call of one that shares the transformer": lambda pipe: generate(shared(pipe)),
    "a stock call over the same transformer": lambda pipe: generate(stock(pipe), num_frames=9),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_second_thread_is_told(other, pipe):
    alone = generate(pipe)
    before = traces(pipe)
    with Paused(pipe) as first:
        with pytest.raises(BusyPipelineError, match=MESSAGE):
            OTHERS[other](pipe)
        assert traces(pipe) != before  # the first thread's processors are still there
    assert torch.equal(first.made.result(), alone)
    assert traces(pipe) == before
    assert pipe.packforcing.sessions == {}
    assert torch.equal(generate(pipe), alone)


def test_an_open_stream_waits_for_its_turn(pipe):
    """Between two of its chunks the pipeline is free; a chunk that comes too early is made later, and is the same."""
    wanted = generate(pipe)
    stream = pipe.packforcing.stream(**CALL, generator=seeded())
    parts = [next(stream)]
    with Paused(pipe):
        with pytest.raises(BusyPipelineError, match=MESSAGE):
            next(stream)
        with pytest.raises(BusyPipelineError, match=MESSAGE):
            stream.send("the blue square", cut=True)
    parts += list(stream)
    assert torch.equal(torch.cat(parts, dim=2), wanted)


def test_a_stream_is_not_ended_while_another_thread_draws_from_it(pipe):
    reached, go_on = threading.Event(), threading.Event()

    def pause(pipe, step, timestep, tensors):
        reached.set()
        assert go_on.wait(60)
        return tensors

    stream = pipe.packforcing.stream(**CALL, generator=seeded(), callback_on_step_end=pause)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(next, stream)
        assert reached.wait(60)
        for end in (stream.close, lambda: stream.throw(ZeroDivisionError)):
            with pytest.raises(BusyPipelineError, match="this stream is making a chunk"):
                end()
        go_on.set()
        assert made.result().shape[2] == 2
    stream.close()
    assert pipe.packforcing.sessions == {}


def test_a_stream_may_go_on_in_another_thread(pipe):
    wanted = generate(pipe)
    stream = pipe.packforcing.stream(**CALL, generator=seeded())
    parts = [next(stream)]
    with ThreadPoolExecutor(1) as pool:
        parts += pool.submit(list, stream).result()
    assert torch.equal(torch.cat(parts, dim=2), wanted)


def test_threads_that_race_get_the_right_video_or_are_told(pipe):
    wanted = {seed: generate(pipe, generator=seeded(seed)) for seed in range(2)}
    before = traces(pipe)

    def race(seed):
        made = []
        for _ in range(12):
            try:
                made.append(generate(pipe, generator=seeded(seed)))
            except BusyPipelineError:
                continue
        return made

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(race, wanted))
    assert any(results)
    assert all(torch.equal(each, wanted[seed]) for seed, made in enumerate(results) for each in made)
    assert traces(pipe) == before


def test_a_pipeline_of_its_own_for_each_thread():
    pipes = [enabled(), enabled()]
    wanted = generate(pipes[0])
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(each, wanted) for each in pool.map(generate, pipes))


def test_an_error_lets_the_next_thread_in(pipe):
    with pytest.raises(InvalidOptionError):
        generate(pipe, output_type="gif")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(generate, pipe).result().shape[2] == 7


def test_what_a_step_calls_back_is_told(pipe):
    """By the pipeline itself or one that shares its transformer, and no harm is done to either video."""
    wanted, before, told = generate(pipe), traces(pipe), []
    streams = [each.packforcing.stream(**CALL, generator=seeded()) for each in (pipe, shared(pipe))]
    inner = [*(lambda s=s: next(s) for s in streams), lambda: streams[0].send("night"), lambda: generate(pipe)]

    def callback(pipe, step, timestep, tensors):
        driven = traces(pipe)
        for use in inner:
            with pytest.raises(BusyPipelineError, match="called back from inside of it"):
                use()
            told.append(traces(pipe) == driven != before)
        return tensors

    assert torch.equal(generate(pipe, callback_on_step_end=callback), wanted)
    assert len(told) == 4 * 2 * 4  # chunks, steps, uses
    assert all(told)
    assert traces(pipe) == before
    assert torch.equal(torch.cat(list(streams[0]), dim=2), wanted)
    assert sum(each.shape[2] for each in streams[1]) == wanted.shape[2]


def test_an_interrupt_as_a_thread_begins_leaves_the_stock_transformer(monkeypatch):
    model = torch.nn.Module()
    with monkeypatch.context() as patch:
        patch.setattr(threads, "require_thread", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), threads.one_thread(model, drives=True):
            pytest.fail("it had not begun")
    assert not [name for name in vars(model) if name.startswith("_kvpack")]
    with threads.one_thread(model), threads.one_thread(model, drives=True):
        assert threads.holder(model) is threading.current_thread()
    assert threads.holder(model) is None
