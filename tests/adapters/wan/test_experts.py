"""Two experts that share the steps: the stock video in one chunk, a memory each, and what cannot be shared."""

import copy

import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import WanPipeline, WanTransformer3DModel

from helpers import distance, generated, quiet, seeded
from kvpack.errors import UnsupportedPipelineError
from kvpack.planning import presets
from kvpack.testing import tiny_wan_pipeline, tiny_wan_transformer

CALL = {
    "prompt": "a red circle",
    "height": 32,
    "width": 32,
    "num_inference_steps": 4,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
SIZES = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 2, "archive_blocks": 3}


def experts(second=None, boundary=0.875):
    """A pipeline whose first step of four is the first expert's."""
    pipe = tiny_wan_pipeline()
    second = tiny_wan_transformer(1) if second is None else second
    return quiet(WanPipeline(**{**pipe.components, "transformer_2": second}, boundary_ratio=boundary))


def video(pipe, frames, **changed):
    return generated(pipe, **{**CALL, "num_frames": frames, "generator": seeded(), **changed})


def test_a_chunk_is_the_stock_video():
    pipe = experts()
    wanted = video(pipe, 13, guidance_scale_2=2.0)
    assert distance(video(quiet(tiny_wan_pipeline()), 13), wanted) > 0.01  # the second one counts
    pipe.enable_packforcing("full", chunk_frames=4)
    assert distance(video(pipe, 13, guidance_scale_2=2.0), wanted) < 1e-5
    pipe.disable_packforcing()
    assert torch.equal(video(pipe, 13, guidance_scale_2=2.0), wanted)


def test_offloaded_experts_are_never_in_at_once(monkeypatch):
    pipe = experts()
    wanted = video(pipe.enable_packforcing("packforcing", **SIZES), 29)
    pipe.enable_model_cpu_offload(device="cpu")
    inside, most = set(), []
    before, out = CpuOffload.pre_forward, CpuOffload.init_hook

    def pre_forward(self, module, *args, **kwargs):
        found = before(self, module, *args, **kwargs)
        previous = self.prev_module_hook and self.prev_module_hook.model
        inside.discard(id(previous))
        inside.add(id(module))
        most.append(len(inside & {id(pipe.transformer), id(pipe.transformer_2)}))
        return found

    def init_hook(self, module):
        inside.discard(id(module))
        return out(self, module)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    monkeypatch.setattr(CpuOffload, "init_hook", init_hook)
    assert torch.equal(video(pipe, 29), wanted)
    assert max(most) == 1


# Blocks that are chosen by queries are chosen by each expert's own, at its first step.
STACKS = {
    "packforcing": {**SIZES, "selector": "recency"},
    "h2o": {"chunk_frames": 2, "budget_frames": 6, "recent_frames": 2},
    "magi": {"chunk_frames": 1, "previous_chunks": (4, 3, 2, 1)},
    "token-trim": {"chunk_frames": 2, "window_frames": 6, "deviations": -9.0},  # every chunk is made twice
}


@pytest.mark.parametrize("stack", STACKS)
def test_the_same_expert_twice_is_one_model(stack):
    """Both see all of the past: either one's memory is that of a model that makes all steps."""
    alone = quiet(tiny_wan_pipeline())
    pipe = experts(copy.deepcopy(alone.transformer))
    for each in (alone, pipe):
        each.enable_packforcing(stack, **STACKS[stack])
    assert torch.equal(video(pipe, 53), video(alone, 53))
    one, two = alone.packforcing.stats(), pipe.packforcing.stats()
    assert two["branches"] == ["cond", "uncond", "cond transformer_2", "uncond transformer_2"]
    held = [each["resident_bytes"] - each["workspace_bytes"] for each in (one, two)]
    assert held[1] == 2 * held[0]


@pytest.mark.parametrize("tells", [True, False])
def test_each_expert_attends_what_its_own_steps_ask_for(tells, monkeypatch):
    """Whether the pipeline says its step or it is counted."""
    if not tells:
        real = WanTransformer3DModel.cache_context
        monkeypatch.setattr(WanTransformer3DModel, "cache_context", lambda self, name, **_: real(self, name))
    pipe = experts().enable_packforcing("magi", chunk_frames=1, previous_chunks=(4, 3, 2, 1))
    with pipe.packforcing.stream(**{**CALL, "guidance_scale": 1.0, "num_frames": None}, generator=seeded()) as stream:
        for _ in range(6):
            next(stream)
        sessions = pipe.packforcing.sessions.values()
        assert [session.stats()["attended_tokens"] for session in sessions] == [4 * 4, 3 * 4]


def test_other_experts_have_other_keys_of_the_same_past(tmp_path):
    pipe = experts().enable_packforcing("packforcing", **SIZES)
    wanted = video(pipe, 53)
    with pipe.packforcing.stream(**{**CALL, "num_frames": 53}, generator=seeded()) as stream:
        parts = [next(stream) for _ in range(4)]
        first, second = (pipe.packforcing.sessions[name].past for name in ("cond", "cond transformer_2"))
        keys = [past.states[0].whole[0].block.keys for past in (first, second)]
        assert first.book.frames == second.book.frames == 8
        assert distance(*keys) > 0.01
        stream.save(tmp_path)
    rest = experts().enable_packforcing("packforcing", **SIZES).packforcing.resume(tmp_path)
    assert torch.equal(torch.cat([*parts, *rest], dim=2), wanted)


def test_one_of_the_two_may_make_all_steps():
    for boundary, which in ((0.0, 0), (1.1, 1)):
        pipe, alone = experts(boundary=boundary), quiet(tiny_wan_pipeline(seed=0))
        if which:
            alone.register_modules(transformer=tiny_wan_transformer(1))
        for each in (pipe, alone):
            each.enable_packforcing("packforcing", **SIZES)
        assert torch.equal(video(pipe, 29), video(alone, 29))


def test_what_is_refused(tmp_path):
    pipe = experts(tiny_wan_transformer(1, num_attention_heads=4))
    with pytest.raises(UnsupportedPipelineError, match="num_attention_heads is 2 in transformer and 4"):
        pipe.enable_packforcing("full")
    for options, why in (
        ({"compressor": "lr"}, "makes tokens for one"),
        ({"commit": "last-step"}, "last denoising step"),
    ):
        pipe = experts().enable_packforcing("packforcing", **SIZES, **options)
        with pytest.raises(UnsupportedPipelineError, match=why):
            video(pipe, 13)
    experts().save_config(tmp_path)
    with pytest.raises(UnsupportedPipelineError, match=r"has boundary_ratio=0.875"):
        presets.from_folder(tmp_path)


def test_a_budget_counts_the_memories_of_both():
    pipe = experts().enable_packforcing("packforcing", **SIZES)
    video(pipe, 45, guidance_scale=1.0)
    held = pipe.packforcing.stats()["resident_bytes"]
    pipe.enable_packforcing("packforcing", chunk_frames=2, budget_gb=held * 1.01 / 1e9)
    video(pipe, 45, guidance_scale=1.0)
    assert pipe.packforcing.stats()["resident_bytes"] <= pipe.packforcing.choice.held_bytes <= held * 1.01


def test_a_writer_is_refused_before_a_chunk_is_made():
    pipe = experts().enable_packforcing("packforcing", **SIZES)
    pipe.packforcing.writer = tiny_wan_transformer(1)
    with pytest.raises(UnsupportedPipelineError, match="a writer cannot commit for two experts"):
        video(pipe, 45)
