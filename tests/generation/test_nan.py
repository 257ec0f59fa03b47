"""A chunk that holds NaN: refused, or made again of other noise, so often and no more, over a memory that stays."""

import logging
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from helpers import SMALL, SMALL_CALL, quiet, same, seeded
from kvpack.adapters.wan.run import WanRun
from kvpack.errors import InvalidOptionError, NonFiniteLatentsError
from kvpack.generation.chunks import NAN_RETRIES
from kvpack.testing import tiny_wan_pipeline

CALL = {**SMALL_CALL, "num_frames": 33}


class Spoiler:
    """A callback that makes tries of one chunk NaN, and looks at the memory in each."""

    def __init__(self, chunk, times):
        self.chunk, self.times, self.seen = chunk, times, []

    def __call__(self, pipe, step, timestep, tensors):
        session = pipe.packforcing.sessions["cond"]
        if session.frames == 2 * self.chunk and step == CALL["num_inference_steps"] - 1:
            held = pipe.packforcing.stats()["resident_bytes"]
            self.seen.append((held, [each.clone() for each in kept(session)], tensors["latents"].clone()))
            if len(self.seen) <= self.times:
                return {"latents": tensors["latents"] * torch.nan}
        return tensors


def kept(session):
    return [
        tensor
        for state in session.past.states
        for each in state.whole
        for tensor in (each.block.keys, each.block.values)
    ]


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline()).enable_packforcing("packforcing", **SMALL)


def parts(pipe, **more):
    return list(pipe.packforcing.stream(**{**CALL, "generator": seeded(), **more}))


@pytest.mark.parametrize("times", [1, NAN_RETRIES])
def test_it_is_made_again_of_the_noise_that_comes_next(times, pipe, monkeypatch, caplog):
    spoiler, draw = Spoiler(3, times), WanRun.noise
    with caplog.at_level(logging.WARNING, "kvpack"):
        made = parts(pipe, on_nan="retry", callback_on_step_end=spoiler)
    assert caplog.text.count("chunk 3 holds NaN or infinity after denoising; it is made again") == times

    def later(run, first, frames):
        for _ in range(times if first == 6 else 0):
            draw(run, first, frames)
        return draw(run, first, frames)

    monkeypatch.setattr(WanRun, "noise", later)
    assert same(made, parts(pipe))
    tries = spoiler.seen
    assert len({held for held, *_ in tries}) == 1
    assert len(tries[0][1])
    assert all(same(past, tries[0][1]) for _, past, _ in tries)
    assert not torch.equal(tries[0][2], tries[1][2])


def test_a_stream_without_end_has_its_tries_too(pipe):
    expected = parts(pipe, on_nan="retry", callback_on_step_end=Spoiler(2, 1))
    endless = {**CALL, "num_frames": None, "generator": seeded(), "callback_on_step_end": Spoiler(2, 1)}
    with pipe.packforcing.stream(**endless, on_nan="retry") as stream:
        assert same([next(stream) for _ in range(4)], expected[:4])


def test_the_seconds_of_a_spoilt_try_are_counted(pipe, monkeypatch):
    def blocks(**more):
        clock = SimpleNamespace(perf_counter=partial(next, count()))  # so that each block takes a second
        monkeypatch.setattr("kvpack.generation.denoiser.time", clock)
        parts(pipe, **more)
        return pipe.packforcing.stats()["seconds"]["denoise"]

    assert blocks(on_nan="retry", callback_on_step_end=Spoiler(3, 2)) == blocks() + 2


def test_not_for_ever(pipe):
    stock = quiet(tiny_wan_pipeline())
    spoiler = Spoiler(1, 100)
    with pytest.raises(NonFiniteLatentsError, match="chunk 1 holds NaN"):
        pipe(**{**CALL, "generator": seeded()}, on_nan="retry", callback_on_step_end=spoiler)
    assert len(spoiler.seen) == 1 + NAN_RETRIES
    assert pipe.packforcing.stats()["frames"] == 2
    pipe.disable_packforcing()
    short = {**CALL, "num_frames": 9}
    assert torch.equal(pipe(**short, generator=seeded()).frames, stock(**short, generator=seeded()).frames)


def test_once_is_too_often_by_default(pipe):
    spoiler = Spoiler(1, 1)
    with pytest.raises(NonFiniteLatentsError):
        parts(pipe, callback_on_step_end=spoiler)
    assert len(spoiler.seen) == 1
    with pytest.raises(InvalidOptionError, match="on_nan must be one of raise, retry, got 'ignore'"):
        pipe.packforcing.stream(**CALL, on_nan="ignore")


def test_a_generation_that_goes_on_retries_as_before(pipe, tmp_path):
    expected = parts(pipe, on_nan="retry", callback_on_step_end=Spoiler(3, 2))
    with pipe.packforcing.stream(
        **CALL, generator=seeded(), on_nan="retry", callback_on_step_end=Spoiler(99, 0)
    ) as stream:
        first = [next(stream), next(stream)]
        stream.save(tmp_path)
    rest = list(pipe.packforcing.resume(tmp_path, callback_on_step_end=Spoiler(3, 2)))
    assert same(first + rest, expected)


def test_given_latents_are_no_other_noise(pipe):
    latents = torch.zeros(1, 16, 5, 2, 4)
    with pytest.raises(InvalidOptionError, match='on_nan="retry" draws other noise, but latents are given'):
        pipe.packforcing.stream(**CALL, latents=latents, on_nan="retry")
