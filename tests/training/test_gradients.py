"""Gradients through selection, re-indexing, RoPE and attention into what compresses, against finite differences."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from kvpack.adapters import WanAdapter
from kvpack.errors import GradientError
from kvpack.memory.roles import LatentCompressor
from kvpack.plugins.registry import registry
from kvpack.policies import QueryTopK, packforcing
from kvpack.policies.pool import PoolCompressor, pooled_grid
from kvpack.testing import tiny_wan_pipeline
from kvpack.training.buffer import GraphLayer, StraightThrough, backward_history, histories
from kvpack.training.distillation import ContextDistillation
from kvpack.training.targets import targets

FRAMES, SIZE = 10, (4, 4)  # five chunks of two latent frames of 2x2 tokens


@dataclass(frozen=True)
class Learned(LatentCompressor):
    """Pools the latents and projects them."""

    module: Any
    name = "test-learned"

    def span(self, first_frame, frames, grid):
        return PoolCompressor().span(first_frame, frames, grid)

    def tokens(self, chunk):
        small = nn.functional.adaptive_avg_pool3d(chunk.latents, pooled_grid(chunk.latents.shape[2], chunk.grid))
        return self.module(small.flatten(2).transpose(1, 2))


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_wan_pipeline().to(torch.float64)
    for each in (pipe.transformer, pipe.vae, pipe.text_encoder):
        each.requires_grad_(False)
    return pipe


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Linear(16, 24).double()


@dataclass(frozen=True)
class OneOfTwo(QueryTopK):
    """Attends nothing compressed before there is a choice: no commit before the last chunk sees any of it."""

    name = "test-one-of-two"

    def limit(self, candidates):
        return int(candidates == 2)


def stack_of(module, **options):
    options = {"topk": 1, "sink_frames": 2, "recent_frames": 2, "chunk_frames": 2, **options}
    return packforcing(compressor=Learned(module), **options)


def clips(rows=2):
    return torch.randn(rows, 16, FRAMES, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def predictions(pipe, stack, buffer, timesteps=(900.0, 500.0), visit=lambda rollout, velocity: None):
    trainee = WanAdapter().trainee(pipe, 8)
    chunks = clips().split(2, dim=2)
    rollout = trainee.rollout(stack, trainee.embed(["a red circle", "the blue square"]), SIZE, buffer)
    found = []
    with rollout.attached():
        for chunk in chunks[:-1]:
            rollout.commit(chunk)
        for step, timestep in enumerate(timesteps):
            velocity = rollout.predict(chunks[-1], timestep, step)
            visit(rollout, velocity)
            found.append(velocity.detach())
    return found, rollout


@pytest.mark.parametrize("reindexer", ["contiguous", "fit", "absolute"])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_finite_differences(reindexer, shared, pipe, module, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the stock norms compute in float32
    # A graph spans one chunk: what a commit saw of twins has no gradient, and must not see any to compare.
    trained = {"train_frames": 8} if reindexer == "fit" else {}
    stack = stack_of(module, selector=OneOfTwo(1), topk=None, reindexer=reindexer, **trained, share_selection=shared)
    weights = [torch.randn(2, 16, 2, *SIZE, generator=torch.Generator().manual_seed(s)).double() for s in (2, 3)]

    def total():
        found, rollout = predictions(pipe, stack, GraphLayer)
        return sum((w * v).sum() for w, v in zip(weights, found, strict=True)), rollout

    cuts = []

    def visit(rollout, velocity):
        cuts[:] = histories(rollout.session)
        (weights[0 if not visit.seen else 1] * velocity).sum().backward()
        visit.seen += 1

    visit.seen = 0
    _, rollout = predictions(pipe, stack, GraphLayer, visit=visit)
    backward_history(cuts)
    chosen = rollout.session.stats()["selected"]
    assert torch.tensor(chosen).shape == (2, 2, 1)  # layers, rows, blocks
    assert module.weight.grad.abs().max() > 0
    step = 1e-4
    for name, index in (("weight", (3, 5)), ("weight", (20, 11)), ("bias", (7,))):
        parameter = getattr(module, name)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
            value, moved = total()
            assert moved.session.stats()["selected"] == chosen
            ends.append(float(value))
            with torch.no_grad():
                parameter[index] -= sign * step
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float(parameter.grad[index]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_the_graph_says_what_generation_says(pipe, module):
    """The buffer that lets gradients through attends what the packed one does."""
    from kvpack.memory.layer import LayerCache

    stack = stack_of(module.requires_grad_(False), topk=2)
    with torch.no_grad():
        packed, _ = predictions(pipe, stack, LayerCache)
        graph, _ = predictions(pipe, stack, GraphLayer)
    for one, other in zip(packed, graph, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_packed_buffer_refuses_gradients(pipe, module):
    from kvpack.memory.layer import LayerCache

    with pytest.raises(GradientError, match="gradients are enabled"):
        predictions(pipe, stack_of(module), LayerCache)


@pytest.mark.parametrize("rule", ["oldest", "spread", "least-selected", "merged"])
def test_gradients_pass_through_a_full_archive(rule, pipe, module, monkeypatch):
    """Nothing that backward needs is written over where blocks leave it."""
    monkeypatch.setitem(globals(), "FRAMES", 18)
    stack = replace(stack_of(module, archive_blocks=3, reindexer="contiguous"), eviction=rule)
    cuts = []

    def visit(rollout, velocity):
        cuts[:] = histories(rollout.session)
        velocity.sum().backward()

    predictions(pipe, stack, GraphLayer, visit=visit)
    backward_history(cuts)
    assert module.weight.grad.abs().max() > 0


@pytest.mark.parametrize("changed", [{"archive_blocks": 1}, {"store": "int4"}], ids=str)
def test_the_teacher_forgets_nothing(changed, pipe, module):
    """A student that keeps all tokens loses nothing but what a full archive and a codec lose."""
    from kvpack.training.clips import Clip

    trainee = WanAdapter().trainee(pipe, 8)
    clip, losses = Clip("one", clips(1)[0], trainee.embed(["a red circle"])[0]), []
    sizes = {"sink_frames": 2, "recent_frames": 2, "chunk_frames": 2, "archive_blocks": None, "reindexer": "contiguous"}
    for options in ({}, changed):
        stack = registry().stack("packforcing", {**sizes, "compressor": "identity", "selector": "all", **options})
        objective = ContextDistillation(trainee, stack, module, pipe.scheduler, steps=2)
        losses.append(sum(objective.measure([clip], [4], seed=0)[4]))
    assert losses[0] < 1e-12 < losses[1]


def test_memory_is_that_of_one_step(pipe, module):
    """Backward stops at history: the second step's graph needs nothing of the first's."""
    stack = stack_of(module)
    kept = []

    def visit(rollout, velocity):
        velocity.sum().backward()
        history, _ = rollout.session.attended(0)
        kept.append(velocity.grad_fn is not None and history.grad is not None)

    predictions(pipe, stack, GraphLayer, visit=visit)
    assert kept == [True, True]
    assert module.weight.grad is None  # not before history is told


def test_weights_of_the_model_have_no_gradient(pipe, module):
    trainee = WanAdapter().trainee(pipe, 8)
    from kvpack.training.clips import Clip

    embeds = trainee.embed(["a red circle"])[0]
    clip = Clip("one", clips(1)[0], embeds)
    objective = ContextDistillation(trainee, stack_of(module), module, pipe.scheduler, steps=2)
    assert targets(objective.stack, FRAMES) == [3, 4]
    told = objective.backward(0, [clip, clip], torch.Generator().manual_seed(0), lambda loss: loss.backward())
    assert told["loss"] > 0
    assert module.weight.grad.abs().max() > 0
    assert all(each.grad is None for each in pipe.transformer.parameters())


@pytest.mark.parametrize("store", ["int8", "int4", "fp8", "residual"])
@pytest.mark.parametrize("tier", ["device", "disk"])
def test_rounding_of_the_archive_takes_no_gradient_away(store, tier, pipe, module):
    trainee = WanAdapter().trainee(pipe, 8)
    from kvpack.training.clips import Clip

    clip = Clip("one", clips(1)[0], trainee.embed(["a red circle"])[0])
    found, losses = {}, {}
    for each in ("dense", store):
        stack = replace(stack_of(module), store=registry().policy("codec", each), tier=tier)
        objective = ContextDistillation(trainee, stack, module, pipe.scheduler, steps=2, chunks=2)
        objective.backward(0, [clip], torch.Generator().manual_seed(0), lambda loss: loss.backward())
        found[each], losses[each] = module.weight.grad.flatten(), objective.measure([clip], [3, 4], seed=0)
        module.weight.grad = module.bias.grad = None
    assert torch.cosine_similarity(found[store], found["dense"], dim=0) > 0.99
    assert losses[store] != losses["dense"]  # what is attended is rounded all the same


def test_what_passes_straight_through_is_what_a_codec_gives_back():
    keys = torch.randn(2, 6, 2, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    codec = registry().policy("codec", "int4")
    passed = StraightThrough(codec)
    for encode, decode in (("encode_keys", "decode_keys"), ("encode_values", "decode_values")):
        back = getattr(codec, decode)(getattr(codec, encode)(keys.detach()), 6, torch.float32)
        (given,) = getattr(passed, encode)(keys)
        assert torch.equal(getattr(passed, decode)((given,), 6, torch.float32), back)
        (gradient,) = torch.autograd.grad(given.square().sum(), keys)
        assert torch.equal(gradient, 2 * back)


def test_training_lowers_the_loss(pipe, module):
    trainee = WanAdapter().trainee(pipe, 8)
    from kvpack.training.clips import Clip

    embeds = trainee.embed(["a red circle"])[0]
    clip = Clip("one", clips(1)[0], embeds)
    objective = ContextDistillation(trainee, stack_of(module), module, pipe.scheduler, steps=2)
    before = sum(objective.measure([clip], [4], seed=0)[4])
    optimiser = torch.optim.AdamW(module.parameters(), 3e-2, weight_decay=0.0)
    for step in range(12):
        objective.backward(step, [clip], torch.Generator().manual_seed(step), lambda loss: loss.backward())
        optimiser.step()
        optimiser.zero_grad()
    assert sum(objective.measure([clip], [4], seed=0)[4]) < 0.9 * before


def test_chunks_of_one_rollout_are_rollouts_of_each(pipe, module, monkeypatch):
    trainee = WanAdapter().trainee(pipe, 8)
    from kvpack.training import distillation
    from kvpack.training.clips import Clip

    monkeypatch.setattr(distillation, "noise_like", lambda like, source: torch.ones_like(like))
    clip = Clip("one", clips(1)[0], trainee.embed(["a red circle"])[0])
    found = {}
    for chosen in ([3], [4], [3, 4]):
        monkeypatch.setattr(distillation, "targets", lambda *_, chosen=chosen: chosen)
        stack = stack_of(module, topk=2)
        objective = ContextDistillation(trainee, stack, module, pipe.scheduler, steps=2, chunks=len(chosen))
        told = objective.backward(0, [clip], torch.Generator().manual_seed(0), lambda loss: loss.backward())
        measured = objective.measure([clip], chosen, seed=0)
        assert told["loss"] == pytest.approx(sum(map(sum, measured.values())) / (2 * len(chosen)))
        found[len(chosen), chosen[0]] = told["loss"], module.weight.grad.clone()
        module.weight.grad = module.bias.grad = None
    assert found[2, 3][0] == pytest.approx((found[1, 3][0] + found[1, 4][0]) / 2)
    torch.testing.assert_close(found[2, 3][1], (found[1, 3][1] + found[1, 4][1]) / 2)
    assert not torch.allclose(found[1, 3][1], found[1, 4][1])
