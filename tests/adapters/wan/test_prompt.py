"""Keys and values of the prompt are computed once, and never of what was."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from helpers import enable_small, generated, quiet
from kvpack.adapters.wan import prompt_cache as wan_prompt
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 32,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
STEPS = CALL["num_inference_steps"]


class Counting(torch.nn.Module):
    """A projection that counts its calls."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, hidden):
        self.calls += 1
        return self.module(hidden)


@pytest.fixture
def pipe():
    return enable_small(quiet(tiny_wan_pipeline()))


def count(pipe):
    """Counts the projections of the prompt in the last layer."""
    attention = pipe.transformer.blocks[-1].attn2
    attention.to_k, attention.to_v = Counting(attention.to_k), Counting(attention.to_v)
    return lambda: (attention.to_k.calls, attention.to_v.calls)


def generate(pipe, chunks=3, **changed):
    return generated(pipe, **{**CALL, "num_frames": 8 * chunks - 3, **changed})


def stock(pipe, monkeypatch, make=generate, **changed):
    """The same with stock cross-attention."""
    with monkeypatch.context() as patch:
        patch.setattr(wan_prompt, "serves", lambda *_: False)
        return make(pipe, **changed)


@pytest.mark.parametrize(
    "changed",
    [{}, {"guidance_scale": 1.0}, {"prompt": ["a red circle", "the grass"]}],
    ids=["guidance", "no guidance", "batch"],
)
@pytest.mark.parametrize("fused", [False, True])
def test_bit_equal_to_stock_cross_attention(changed, fused, pipe, monkeypatch):
    if fused:
        pipe.transformer.fuse_qkv_projections()
    assert torch.equal(generate(pipe, **changed), stock(pipe, monkeypatch, **changed))


@pytest.mark.parametrize("chunks", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_once_a_prompt_and_branch(chunks, pipe):
    calls = count(pipe)
    generate(pipe, chunks=chunks)
    assert calls() == (2, 2)
    generate(pipe, chunks=chunks)
    assert calls() == (4, 4)  # nothing outlives a generation


def test_once_a_prompt_of_a_schedule(pipe, monkeypatch):
    calls = count(pipe)
    pipe.packforcing.fps = 8  # a chunk a second
    prompt = [(0, "a red circle"), (2, "the blue grass"), (4, "a red circle")]
    frames = generate(pipe, chunks=6, prompt=prompt, guidance_scale=1.0)
    assert calls() == (3, 3)
    assert torch.equal(frames, stock(pipe, monkeypatch, chunks=6, prompt=prompt, guidance_scale=1.0))


def test_callbacks_may_change_anything(pipe, monkeypatch):
    """Weights, in a way that no counter of torch sees, and embeddings."""
    embeds = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
    weight = pipe.transformer.blocks[1].attn2.to_k.weight
    before = weight.detach().clone()

    def callback(pipe, step, timestep, tensors):
        weight.data.mul_(1.5)
        return {"prompt_embeds": embeds} if step else tensors

    def make(pipe):
        weight.data.copy_(before)
        return generate(pipe, callback_on_step_end=callback)

    assert torch.equal(make(pipe), stock(pipe, monkeypatch, make))


def test_who_is_told_of_a_chunk_may_change_weights(pipe, monkeypatch):
    weight = pipe.transformer.blocks[1].attn2.to_k.weight
    before = weight.detach().clone()

    def make(pipe):
        weight.data.copy_(before)
        return generate(pipe, on_chunk=lambda progress: weight.data.mul_(1.5))

    assert torch.equal(make(pipe), stock(pipe, monkeypatch, make))


def test_streams_may_change_anything(pipe, monkeypatch):
    calls, weight = count(pipe), pipe.transformer.blocks[1].attn2.to_v.module.weight
    before = weight.detach().clone()

    def make(pipe):
        weight.data.copy_(before)
        stream, chunks = pipe.packforcing.stream(**CALL, generator=torch.Generator().manual_seed(0)), []
        for turn in range(4):
            chunks.append(stream.send("the green triangle") if turn == 2 else next(stream))
            weight.data.mul_(1.5)
        stream.close()
        return torch.cat(chunks, dim=2)

    frames = make(pipe)
    assert calls() == (2 * 5, 2 * 5)  # four chunks, and recent frames under another prompt
    assert torch.equal(frames, stock(pipe, monkeypatch, make))


def test_groups_that_are_fetched_ahead_are_asked_for_in_every_forward(pipe, monkeypatch):
    """Or what was traced in the first forward would be fetched for nothing, and never go out again."""
    calls = count(pipe)
    monkeypatch.setattr(wan_prompt, "streams_in", lambda module: True)
    generate(pipe)
    assert calls() == (18, 18)  # two branches of three chunks: two steps and a commit


def test_hooks_may_change_anything(pipe, monkeypatch):
    """A user's hook in the transformer: nothing is kept beyond a forward."""
    calls, weight = count(pipe), pipe.transformer.blocks[1].attn2.to_k.module.weight
    before = weight.detach().clone()

    def louder(*_):
        weight.data.mul_(1.1)

    pipe.transformer.blocks[0].register_forward_pre_hook(louder)

    def make(pipe):
        weight.data.copy_(before)
        return generate(pipe)

    frames = make(pipe)
    assert calls() == (2 * 3 * (STEPS + 1),) * 2
    assert torch.equal(frames, stock(pipe, monkeypatch, make))


def test_a_processor_of_the_users_stays(pipe):
    class Mine(WanAttnProcessor):
        calls = 0

        def __call__(self, *args, **kwargs):
            Mine.calls += 1
            return super().__call__(*args, **kwargs)

    frames, mine = generate(pipe), Mine()
    pipe.transformer.blocks[1].attn2.set_processor(mine)
    assert torch.equal(generate(pipe), frames)
    assert Mine.calls == 2 * 3 * (STEPS + 1)
    assert pipe.transformer.blocks[1].attn2.processor is mine
