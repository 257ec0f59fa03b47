"""What the refiner cannot do is refused by name, and whatever happens it is the stock one again."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import TaylorSeerCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName

import kvpack
from helpers import quiet, seeded
from kvpack.errors import GradientError, InvalidOptionError, NonFiniteLatentsError, UnsupportedPipelineError
from kvpack.policies import SinkMidRecentPartitioner
from kvpack.testing import tiny_sana_wm_refiner


@pytest.fixture(scope="module")
def stock():
    return quiet(tiny_sana_wm_refiner())


@pytest.fixture
def pipe(stock):
    return kvpack.enable(copy.copy(stock))


def arguments(frames=10, batch=1):
    raw = torch.randn(batch, 4, frames, 2, 3, generator=seeded())
    return {"sana_latent": raw, "prompt": "the red circle", "fps": 16.0, "output_type": "latent"}


def processors(pipeline):
    return [block.attn1.processor for block in pipeline.transformer.transformer_blocks]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kv_max_frames": 12}, 'enable_packforcing\\("sana-wm", window_frames=12\\)'),
        ({"sink_size": 0}, "sink_size must be >= 1, got 0"),
        ({"block_size": 0}, "block_size must be >= 1, got 0"),
        ({"sink_size": 4}, "sink_size must be at most block_size 3, got 4"),
        ({"output_type": "mp4"}, "output_type"),
        ({"fps": 0.0}, "fps must be a number > 0, got 0.0"),
        ({"fps": float("nan")}, "fps must be a number > 0, got nan"),
        ({"sigmas": (0.0,)}, "sigmas need a step"),
        ({"prompt": ["a", "b"]}, "prompt is one text, got list"),
        ({"prompt": [(1, "a")]}, "begins at 0 seconds"),
        ({"sana_latent": torch.zeros(1, 3, 9, 2, 3)}, r"\[batch, 4 channels, .*got \[1, 3, 9, 2, 3\]"),
        ({"sana_latent": None}, "got NoneType"),
        ({"sana_latent": torch.zeros(1, 4, 1, 2, 3)}, "more frames than sink_size=1, got 1"),
        ({"sana_latent": torch.full((1, 4, 9, 2, 3), torch.nan)}, "NaN"),
        ({"sana_latent": torch.zeros(2, 4, 9, 2, 3), "output_type": "np"}, "batch of 2"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_computed(pipe, changed, message):
    pipe.text_encoder = pipe.connectors = None  # would fail if they were needed
    with pytest.raises((InvalidOptionError, NonFiniteLatentsError), match=message):
        pipe(**{**arguments(), **changed})


def test_the_first_chunk_is_the_calls_sink(pipe):
    pipe.packforcing.first_chunk_frames = 2
    with pytest.raises(InvalidOptionError, match="give sink_size=2"):
        pipe(**arguments())
    assert pipe(**arguments(), sink_size=2).shape[2] == 10


def test_pixels_are_not_streamed(pipe):
    with pytest.raises(InvalidOptionError, match='stream with output_type="latent"'):
        pipe.packforcing.stream(**{**arguments(), "output_type": "np"})


@pytest.mark.parametrize("name", ["packforcing-paper", "krea"])
def test_memories_that_look_at_latents_are_refused(stock, name):
    with pytest.raises(InvalidOptionError, match="looks at latents or pixels"):
        kvpack.enable(copy.copy(stock), name)
    assert type(stock).__module__.startswith("diffusers.")


def test_the_stack_must_do_with_the_calls_blocks(pipe):
    kvpack.enable(pipe, "packforcing", sink_frames=0, recent_frames=4)
    with pytest.raises(InvalidOptionError, match="sink_frames \\+ recent_frames must be at least chunk_frames 5"):
        pipe(**arguments(), block_size=5)


def test_what_is_switched_on_is_refused(stock):
    pipe = tiny_sana_wm_refiner()
    pipe.transformer.enable_cache(TaylorSeerCacheConfig())
    with pytest.raises(UnsupportedPipelineError, match="disable_cache"):
        kvpack.enable(pipe)
    pipe.transformer.disable_cache()
    processors(pipe)[0]._attention_backend = AttentionBackendName.XFORMERS
    with pytest.raises(UnsupportedPipelineError, match="xformers, which does not run on cpu"):
        kvpack.enable(pipe)
    processors(pipe)[0]._attention_backend = None
    processors(pipe)[0]._parallel_config = SimpleNamespace()
    with pytest.raises(UnsupportedPipelineError, match="context parallelism"):
        kvpack.enable(pipe)
    with pytest.raises(UnsupportedPipelineError, match="patch_size_t is 2"):
        kvpack.enable(tiny_sana_wm_refiner(patch_size_t=2, in_channels=8, out_channels=8))


class Broken(SinkMidRecentPartitioner):
    """Fails once two chunks are there."""

    def partition(self, history_frames, chunk_frames):
        if history_frames == 7:
            raise ZeroDivisionError
        return super().partition(history_frames, chunk_frames)


ERRORS = {
    "scheduler": ZeroDivisionError,
    "transformer": ZeroDivisionError,
    "policy": ZeroDivisionError,
    "weights": NonFiniteLatentsError,
    "gradients": GradientError,
}


@pytest.mark.parametrize("where", ERRORS)
def test_after_an_error_it_is_the_stock_pipeline(stock, where, monkeypatch):
    wanted, before, hooks = stock(**arguments()), processors(stock), dict(stock.transformer._forward_pre_hooks)
    pipe = kvpack.enable(copy.copy(stock), "sana-wm")
    left = set(vars(pipe))

    def fail(*_, **__):
        raise ZeroDivisionError

    def forget(_, __, output):
        return (output[0] * torch.nan,)

    handle = None
    if where == "scheduler":
        monkeypatch.setattr(stock.scheduler, "step", fail)
    elif where == "transformer":
        handle = stock.transformer.transformer_blocks[1].register_forward_hook(fail)
    elif where == "gradients":
        step = stock.scheduler.step
        monkeypatch.setattr(stock.scheduler, "step", lambda *a, **k: (torch.set_grad_enabled(True), step(*a, **k))[1])
    elif where == "weights":
        handle = stock.transformer.register_forward_hook(forget)
    else:
        kvpack.enable(pipe, dataclasses.replace(pipe.packforcing.stack, partitioner=Broken(1, 10)))
    with pytest.raises(ERRORS[where]):
        pipe(**arguments())
    assert torch.is_grad_enabled()
    monkeypatch.undo()
    if handle is not None:
        handle.remove()
    assert processors(stock) == before
    assert dict(stock.transformer._forward_pre_hooks) == hooks
    assert set(vars(pipe)) == left
    assert torch.equal(kvpack.disable(pipe)(**arguments()), wanted)


def test_between_two_blocks_the_pipeline_is_stock(pipe, stock):
    before, left = processors(stock), set(vars(pipe))
    stream = pipe.packforcing.stream(**arguments())
    next(stream)
    assert processors(stock) == before
    assert set(vars(pipe)) == left
    kvpack.disable(pipe)
    with pytest.raises(UnsupportedPipelineError, match="while a stream was open"):
        next(stream)


def test_a_wrong_prompt_sent_leaves_the_stream_running(pipe):
    stream = pipe.packforcing.stream(**arguments())
    next(stream)
    with pytest.raises(InvalidOptionError, match="one text, got list"):
        stream.send(["a", "b"])
    assert next(stream).shape[2] == 3
