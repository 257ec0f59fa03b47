"""What a training is planned to hold is what it holds."""

import importlib.util
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import told
from kvpack.adapters import WanAdapter
from kvpack.errors import InvalidOptionError
from kvpack.planning import presets
from kvpack.policies import packforcing
from kvpack.testing import tiny_wan_pipeline
from kvpack.training.buffer import GraphLayer
from kvpack.training.plan import training_plan

_spec = importlib.util.spec_from_file_location("gradients", Path(__file__).with_name("test_gradients.py"))
gradients = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gradients)


def kept(pipe, size, width):
    """Numbers that the forward of a chunk keeps for its backward pass, and the tokens of chunk and history."""
    stack = gradients.stack_of(nn.Linear(16, width), topk=1)
    trainee = WanAdapter().trainee(pipe, 8)
    chunks = torch.randn(1, 16, 8, *size).split(2, dim=2)
    rollout, found = trainee.rollout(stack, trainee.embed(["a red circle"]), size, GraphLayer), {}
    weights, alive = {each.data_ptr() for each in pipe.transformer.parameters()}, []

    def pack(tensor):
        alive.append(tensor)  # so that no two are at one place
        if tensor.data_ptr() not in weights:
            found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with rollout.attached():
        for chunk in chunks[:-1]:
            rollout.commit(chunk)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            rollout.predict(chunks[-1], 900.0, 0)
        history, _ = rollout.session.attended(0)
    return sum(found.values()) / 4, size[0] * size[1] // 2, history.shape[1]


@pytest.mark.parametrize(("layers", "head_dim", "ffn", "size"), [(2, 12, 64, (8, 8)), (4, 24, 128, (8, 16))])
def test_the_graph_is_as_large_as_planned(layers, head_dim, ffn, size, monkeypatch):
    monkeypatch.setattr("kvpack.adapters.wan.adapter._TEXT_TOKENS", 8)
    pipe = tiny_wan_pipeline(num_layers=layers, attention_head_dim=head_dim, ffn_dim=ffn)
    for each in (pipe.transformer, pipe.vae):
        each.requires_grad_(False)
    counted, chunk, history = kept(pipe, size, 2 * head_dim)
    cost = cost_of(pipe, size)
    assert cost.graph_elements(chunk, history + chunk) == pytest.approx(counted, rel=0.1)
    assert cost.parameters == sum(p.numel() for part in (pipe.transformer, pipe.vae) for p in part.parameters())


def test_a_batch_is_as_large_as_planned(monkeypatch):
    monkeypatch.setattr("kvpack.adapters.wan.adapter._TEXT_TOKENS", 8)
    pipe, size = tiny_wan_pipeline(), (8, 16)
    trainee, latents = WanAdapter().trainee(pipe, 8), torch.zeros(2, 16, 20, *size)
    embeds, cost = trainee.embed(["a red circle", "the blue square"]), cost_of(pipe, size)
    rollout = trainee.rollout(packforcing(compressor="dual"), embeds, size)
    assert rollout.decoder is not None
    with torch.no_grad():
        for chunk in latents.split(4, dim=2):
            rollout.decoder(chunk)
    held = latents.nbytes + embeds.nbytes
    decoder = sum(each.nbytes for each in rollout.decoder.features if isinstance(each, torch.Tensor))
    geometry = WanAdapter().geometry(WanAdapter.configs(pipe), 8 * size[0], 8 * size[1], torch.float32)
    shape = WanAdapter().latent_shape(WanAdapter.configs(pipe))
    plans = {
        each: training_plan(geometry, packforcing(compressor=each), shape, cost, lambda *_: 0, batch=2)
        for each in ("dual", "hr")
    }
    assert {each: plan.batch_bytes for each, plan in plans.items()} == {"dual": held + decoder, "hr": held}
    assert plans["dual"].total_bytes - plans["hr"].total_bytes >= decoder


def cost_of(pipe, size):
    configs = {"transformer": pipe.transformer.config, "vae": pipe.vae.config}
    return WanAdapter().model_cost(configs, 8 * size[0], 8 * size[1])


@cache
def planned(**options):
    adapter, configs = WanAdapter(), presets.preset("wan2.1-t2v-1.3b").configs
    return training_plan(
        adapter.geometry(configs, 480, 832, torch.bfloat16),
        packforcing(compressor="dual", **options),
        adapter.latent_shape(configs),
        adapter.model_cost(configs, 480, 832),
        partial(adapter.forward_flops, configs),
    )


def test_the_reference_model():
    """Of the reference model at 832x480: a clip of five chunks, whose last attends two twins."""
    plan = planned(sink_frames=4)
    assert plan.trained_parameters == 459_520
    assert plan.kv_bytes == (4 * 6240 + 2 * 6240 + 2 * 182) * 184_320
    assert 1.4e9 < plan.model_parameters < 1.6e9
    assert plan.total_bytes < 40e9  # one GPU of 48 GB
    assert planned(sink_frames=8).graph_bytes > 0.9 * plan.graph_bytes
    with pytest.raises(InvalidOptionError, match="no chunk of 4 attends anything"):
        planned(sink_frames=16, reindexer="contiguous")


def test_the_command():
    words = ["plan", "--training", "--preset", "wan2.1-t2v-1.3b", "--size", "832x480", "-o", "sink_frames=4", "--json"]
    given = told(*words)
    assert {name: given[name] for name in planned(sink_frames=4).to_dict()} == planned(sink_frames=4).to_dict()
    assert given["frames"] == 20
