"""A plan says to the token and the byte what a generation will hold."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import kvpack
from kvpack import Compressor, Session
from kvpack.checkpoints.config import Settings
from kvpack.cli.tables import plan_rows
from kvpack.compressors.network import HighResolutionBranch
from kvpack.errors import InvalidOptionError, UnknownNameError, UnsupportedPipelineError
from kvpack.memory.costs import LatentShape
from kvpack.planning import planner, presets
from kvpack.planning.resident import resident
from kvpack.plugins.registry import registry
from kvpack.policies import HighResolutionCompressor
from kvpack.shipped import CALL, demo_stack
from kvpack.testing import TINY, run_session, tiny_wan_pipeline

SHIPPED = Path(kvpack.__file__).parent / "data" / "toyworld"


def stack(name: str, **options: Any) -> Any:
    return registry().stack(name, options)


def geometry(pipe: Any, height: int, width: int) -> kvpack.Geometry:
    configs = {"transformer": pipe.transformer.config, "vae": pipe.vae.config}
    return registry().adapters["wan"].geometry(configs, height, width, pipe.transformer.dtype)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_wan_pipeline()


@pytest.fixture
def wan() -> kvpack.Geometry:
    model = presets.preset("wan2.1-t2v-1.3b")
    return presets.adapter_for(model).geometry(model.configs, 480, 832, torch.bfloat16)


# What these keep of latents depends on their channels, which a session alone is not told.
@pytest.mark.parametrize("name", sorted({*registry().names("stack")} - {"longlive-rag", "token-trim"}))
def test_what_is_planned_is_held_behind_each_chunk(name: str) -> None:
    """The first ones too, in which windows fill."""
    session = Session(stack(name), TINY)
    for chunk in range(9):
        run_session(session, 1, batch=2, seed=chunk)
        held = resident(TINY, session.stack, chunk + 1, 2).bytes(TINY.layers)
        assert session.stats()["resident_bytes"] == held, chunk


def test_two_minutes_of_wan_cost_what_the_paper_says(wan: kvpack.Geometry) -> None:
    pixel_frames, frames = planner.video_frames(120, 16, 4)
    plan = planner.plan(wan, stack("packforcing"), frames)
    assert (pixel_frames, frames, plan.chunks, plan.chunk_tokens) == (1917, 480, 120, 6240)
    assert plan.attended_tokens == 8 * 1560 + 16 * 182 + 4 * 1560 + 4 * 1560 == 27_872
    assert plan.attended_kv_bytes == 3_987_210_240
    assert plan.archive_blocks == 117
    assert plan.archive_kv_bytes == 117 * 182 * 184_320
    assert plan.full_tokens == 748_800
    assert plan.full_kv_bytes == 748_800 * 184_320
    assert planner.plan(wan, stack("full"), frames).attended_tokens == 748_800


def test_a_bounded_archive_is_bounded(wan: kvpack.Geometry) -> None:
    plan = planner.plan(wan, stack("packforcing", archive_blocks=20), 480)
    assert (plan.archive_blocks, plan.archive_kv_bytes) == (20, 20 * 182 * 184_320)
    assert plan.attended_tokens == 27_872


STACKS = {
    "full": stack("full"),
    "self-forcing": stack("self-forcing"),
    "packforcing": stack("packforcing", topk=2, sink_frames=4),
    "pool": stack("packforcing", topk=3, sink_frames=4, reindexer="contiguous"),
    "lr": stack("packforcing", topk=2, sink_frames=4, compressor="lr"),
    "hr": stack("packforcing", topk=2, sink_frames=4, compressor="hr"),
    "bounded": stack("packforcing", topk=1, sink_frames=4, compressor="pool", archive_blocks=2),
    "nothing selected": stack("packforcing", topk=0, sink_frames=4, compressor="pool"),
    "last step": stack("packforcing", topk=2, sink_frames=4, commit="last-step"),
    "no multiples": stack("packforcing", topk=2, sink_frames=3, recent_frames=5, compressor="pool", selector="recency"),
    "identity": stack("packforcing", topk=2, compressor="identity", selector="recency", chunk_frames=3),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("frames", [1, 18])
def test_planned_bytes_are_the_measured_bytes(pipe: Any, name: str, frames: int) -> None:
    planned = planner.plan(geometry(pipe, 64, 64), STACKS[name], frames)
    kvpack.enable(pipe, STACKS[name])
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 8}
    pipe("a red circle", num_frames=4 * frames - 3, output_type="latent", **call)
    measured = pipe.packforcing.stats()
    assert planned.attended_kv_bytes == measured["attended_bytes"]
    assert planned.archive_kv_bytes == measured["archive_bytes"]
    assert planned.archive_blocks == measured["archive_blocks"]
    assert planned.resident_kv_bytes == measured["resident_bytes"]
    assert planned.attended_tokens == measured["attended_tokens"] + planned.chunk_tokens
    assert planned.chunks == measured["chunks"]


def test_batch_and_guidance_multiply_bytes_and_not_tokens(pipe: Any) -> None:
    policy = STACKS["pool"]
    planned = planner.plan(geometry(pipe, 64, 64), policy, 20, batch=2, branches=2)
    kvpack.enable(pipe, policy)
    call = {"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 2.0, "max_sequence_length": 8}
    pipe(["a red circle", "a blue square"], num_frames=77, output_type="latent", **call)
    measured = pipe.packforcing.stats()
    assert planned.attended_kv_bytes == measured["attended_bytes"]
    assert planned.archive_kv_bytes == measured["archive_bytes"]
    assert planned.attended_tokens == measured["attended_tokens"] + planned.chunk_tokens


@pytest.mark.parametrize("name", registry().names("stack"))
def test_planned_bytes_are_the_measured_bytes_of_the_shipped_pipeline(name: str) -> None:
    from diffusers import WanPipeline

    shipped = WanPipeline.from_pretrained(SHIPPED)
    shipped.set_progress_bar_config(disable=True)
    kvpack.enable(shipped, demo_stack(name))
    shipped(
        "a red circle bouncing over dusk rings", num_frames=109, num_inference_steps=1, output_type="latent", **CALL
    )
    planned = planner.plan(geometry(shipped, 64, 64), demo_stack(name), 28)
    measured = shipped.packforcing.stats()
    assert (planned.attended_kv_bytes, planned.archive_kv_bytes) == (
        measured["attended_bytes"],
        measured["archive_bytes"],
    )


def test_attended_tokens_are_bounded_for_every_stack_but_full() -> None:
    for name, policy in STACKS.items():
        early, late = (planner.plan(TINY, policy, 12 * chunks).attended_tokens for chunks in (20, 60))
        assert (late > early) == (name == "full")


def test_operations_count_steps_commit_batch_and_branches(wan: kvpack.Geometry) -> None:
    def forward(query_tokens: int, attended_tokens: int) -> int:
        return query_tokens * attended_tokens

    plan = planner.plan(wan, stack("packforcing"), 480, steps=3, batch=2, branches=2, flops=forward)
    assert plan.flops_per_chunk == (3 + 1) * 2 * 2 * 6240 * 27_872
    assert planner.plan(wan, stack("packforcing"), 480).flops_per_chunk == 0


def test_operations_of_a_real_model_have_the_right_size() -> None:
    model = presets.preset("wan2.1-t2v-1.3b")
    forward = partial(presets.adapter_for(model).forward_flops, model.configs)
    assert 2 * 1.2e9 * 6240 < forward(6240, 6240) < 2 * 2.4e9 * 6240


def test_a_plan_is_plain_data(wan: kvpack.Geometry) -> None:
    plan = planner.plan(wan, stack("self-forcing"), 21)
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    assert all(isinstance(value, (int, str, dict)) for value in plan.to_dict().values())


def test_what_compression_costs_is_stated_by_branch(wan: kvpack.Geometry) -> None:
    model = presets.preset("wan2.1-t2v-1.3b")
    adapter = presets.adapter_for(model)
    forward, latents = partial(adapter.forward_flops, model.configs), adapter.latent_shape(model.configs)

    def planned(compressor: str | Compressor, **options: Any) -> planner.Plan:
        policy = stack("packforcing", compressor=compressor)
        return planner.plan(wan, policy, 480, flops=forward, latents=latents, **options)

    plans = {name: planned(name) for name in ("pool", "lr", "hr", "dual")}
    for name in ("lr", "hr", "dual"):
        assert registry().policy("compressor", name).span(0, 4, wan.grid).tokens == 182  # of 6,240
        assert plans[name].compressor_flops["twin"] == forward(182, 27_872 - 6240 + 182)
    high, low = _branch_flops(16, 1536, (2, 2), 64, (4, 60, 104), 182), latents.encode_flops(5, 112, 208)
    twin = plans["lr"].compressor_flops["twin"]
    assert plans["pool"].compressor_flops == plans["pool"].compressor_parameters == {}
    assert plans["lr"].compressor_flops == {"lr": low, "twin": twin}
    assert plans["hr"].compressor_flops == {"hr": high, "twin": twin}
    assert plans["dual"].compressor_flops == {"lr": low, "hr": high, "twin": twin}
    assert plans["dual"].compressor_parameters == {"lr": 0, "hr": 459_520}
    assert len({plan.flops_per_chunk for plan in plans.values()}) == 1
    assert planned("hr", batch=3, branches=2).compressor_flops == {"hr": 3 * high, "twin": 6 * twin}
    direct = planned(HighResolutionCompressor(project="direct")).compressor_flops
    assert direct == {"hr": high, "twin": 30 * 182 * 4 * 1536 * 1536}
    assert ["KV archived", "3.92 GB: 117 blocks of 182 tokens"] in plan_rows(plans["dual"])
    assert plan_rows(plans["pool"])[-1][0] == "transformer, per chunk"
    name, text = plan_rows(plans["dual"])[-1]
    assert name == "compression, per chunk"
    assert "% of the chunk; hr 459,520 parameters; lr's decoding is the user's own" in text


def test_pieces_of_a_chunk_are_counted_each(wan: kvpack.Geometry) -> None:
    latents = LatentShape(16, (2, 2), (16, 16), lambda frames, height, width: frames)
    policy = stack("packforcing", sink_frames=3, recent_frames=5, compressor="lr")
    assert planner.plan(wan, policy, 64, latents=latents).compressor_flops == {"lr": 1 + 1}  # of 3 + 1 frames
    nothing = stack("packforcing", topk=0, compressor="lr")
    assert planner.plan(wan, nothing, 64, latents=latents).compressor_flops == {}


def test_weights_of_another_model_are_not_planned() -> None:
    model = presets.preset("wan2.1-t2v-14b")
    adapter = presets.adapter_for(model)
    branch = HighResolutionBranch(channels=16, width=1536, patch=(2, 2), base_model="small")
    policy = stack("packforcing", compressor=HighResolutionCompressor(branch))
    shape = adapter.geometry(model.configs, 480, 832, torch.bfloat16)
    with pytest.raises(InvalidOptionError, match="made for small, are for channels=16, width=1536"):
        planner.plan(shape, policy, 480, latents=adapter.latent_shape(model.configs))


@pytest.mark.parametrize(
    ("seconds", "fps", "expected"),
    [
        (120, 16, (1917, 480)),
        (5, 16, (77, 20)),
        (5.0625, 16, (81, 21)),
        (0.0625, 16, (1, 1)),
        (0.1, 30, (1, 1)),
        (0.3, 30, (9, 3)),
    ],
)
def test_video_frames_are_the_longest_that_fit(seconds: float, fps: float, expected: tuple[int, int]) -> None:
    assert planner.video_frames(seconds, fps, 4) == expected


@pytest.mark.parametrize(
    ("seconds", "fps", "message"),
    [
        (0, 16, "seconds must be a number > 0, got 0"),
        (-1, 16, "seconds must be a number > 0, got -1"),
        (float("nan"), 16, "seconds must be a number > 0, got nan"),
        (float("inf"), 16, "seconds must be a number > 0, got inf"),
        (5, 0, "fps must be a number > 0, got 0"),
        (0.01, 16, "seconds must be at least 0.0625, one frame at 16 fps, got 0.01"),
    ],
)
def test_impossible_lengths_are_refused(seconds: float, fps: float, message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        planner.video_frames(seconds, fps, 4)


@pytest.mark.parametrize("size", ["batch", "branches", "steps"])
def test_sizes_that_are_not_positive_are_refused(size: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"{size} must be >= 1, got 0"):
        planner.plan(TINY, stack("full"), 4, **{size: 0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidOptionError, match="frames must be >= 1, got 0"):
        planner.plan(TINY, stack("full"), 0)


@pytest.mark.parametrize(
    ("name", "token_bytes", "grid"),
    [
        ("wan2.1-t2v-1.3b", 184_320, (30, 52)),
        ("wan2.1-t2v-14b", 819_200, (30, 52)),
        ("wan2.2-ti2v-5b", 368_640, (15, 26)),
        ("skyreels-v2-df-1.3b", 184_320, (30, 52)),
        ("skyreels-v2-df-14b", 819_200, (30, 52)),
    ],
)
def test_presets(name: str, token_bytes: int, grid: tuple[int, int]) -> None:
    model = presets.preset(name)
    found = presets.adapter_for(model).geometry(model.configs, 480, 832, torch.bfloat16)
    assert (found.kv_bytes_per_token, found.grid) == (token_bytes, grid)


def test_timing_is_the_models_own(pipe: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", pipe)
    assert presets.timing(folder) == (Settings(fps=16.0), 4)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scale_factor_temporal": 8}))
    assert presets.timing(folder)[1] == 8
    assert planner.video_frames(1, 24, 8) == (17, 3)
    config.write_text("{")  # is told when it is loaded
    assert presets.timing(folder) == (Settings(), 4)
    (folder / "kvpack_config.json").write_text("{")
    with pytest.raises(InvalidOptionError, match="does not hold kvpack's settings"):
        presets.timing(folder)


def test_an_unknown_preset_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"no preset named 'wan2.1-1.3b'; did you mean 'wan2.1-t2v-1.3b'\?"):
        presets.preset("wan2.1-1.3b")


def write_folder(folder: Path, pipe: Any, **index: Any) -> Path:
    """Configs only, as a plan needs them."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index}))
    for part in ("transformer", "vae"):
        getattr(pipe, part).save_config(folder / part)
    return folder


def test_a_folder_without_weights_gives_the_same_geometry(pipe: Any, tmp_path: Path) -> None:
    model = presets.from_folder(write_folder(tmp_path / "model", pipe))
    found = presets.adapter_for(model).geometry(model.configs, 64, 64, torch.float32)
    assert found == geometry(pipe, 64, 64)


def test_broken_folders_are_named(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=r"no model folder .*/absent; give the folder of a whole diffusers"):
        presets.from_folder(tmp_path / "absent")
    with pytest.raises(InvalidOptionError, match=r"has no model_index\.json"):
        presets.from_folder(tmp_path)
    folder = write_folder(tmp_path / "model", pipe)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(InvalidOptionError, match=r"cannot read .*vae/config\.json: No such file"):
        presets.from_folder(folder)
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(InvalidOptionError, match=r"vae/config\.json is not JSON"):
        presets.from_folder(folder)
    (folder / "vae" / "config.json").write_text("[]")
    with pytest.raises(InvalidOptionError, match="must hold a JSON object, got a list"):
        presets.from_folder(folder)


def test_models_that_cannot_run_are_not_planned(pipe: Any, tmp_path: Path) -> None:
    two = write_folder(tmp_path / "two", pipe, transformer_2=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(UnsupportedPipelineError, match="transformer_2"):
        presets.from_folder(two)
    for name in ("FluxPipeline", "NoSuchPipeline"):
        model = presets.from_folder(write_folder(tmp_path / name, pipe, _class_name=name))
        with pytest.raises(UnsupportedPipelineError, match=f"no adapter for {name}.*Installed: .*wan"):
            presets.adapter_for(model)


def _branch_flops(channels, width, patch, hidden, latents, tokens):
    branch = HighResolutionBranch(channels=channels, width=width, patch=patch, hidden=hidden)
    return branch.flops(latents, tokens)
