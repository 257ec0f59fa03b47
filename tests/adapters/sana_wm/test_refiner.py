"""The refiner of SANA-WM over kvpack's memory, against upstream's own call."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, SanaWMLTX2Refiner
from diffusers.models.attention_dispatch import attention_backend

from helpers import distance, quiet, seeded
from kvpack.adapters.sana_wm.denoiser import SanaWMDenoiser
from kvpack.memory import Attended, StateMemory
from kvpack.plugins.registry import registry
from kvpack.testing import check_adapter, tiny_sana_wm_refiner

UNBOUNDED = 1000  # frames of upstream's window, in which nothing is forgotten
PROMPT = "the red circle"


def arguments(frames=25, batch=1, **changed):
    generator = seeded()
    raw = torch.randn(batch, 4, frames, 2, 3, generator=generator)
    return {"sana_latent": raw, "prompt": PROMPT, "fps": 16.0, "output_type": "latent", **changed}


def call(blocks, **changed):
    return arguments(1 + 3 * blocks, generator=seeded(1), **changed)


def refiner(**config):
    return quiet(tiny_sana_wm_refiner(**config))


@pytest.fixture
def pipe():
    return refiner()


def test_keeps_what_every_adapter_must(pipe):
    """The long run is 24 times the window of 11 frames that the model was trained with."""
    full = registry().stack("full", {})
    check_adapter(pipe, call, identity=(full, pipe(**call(3, kv_max_frames=UNBOUNDED))), chunks=24 * 11 // 3)


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({}, {}),
        ({"rope_type": "split"}, {}),
        ({"gated_attn": True}, {"block_size": 2}),
        ({"rope_type": "split"}, {"block_size": 4, "sink_size": 2}),
    ],
    ids=lambda each: "-".join(map(str, each)) or "default",
)
@pytest.mark.parametrize("frames", [25, 24])
def test_equals_upstream_with_and_without_its_window(config, changed, frames):
    """With 24 frames the last block is shorter; the window slides from the fifth block on."""
    pipe = refiner(**config)
    given = arguments(frames, **changed)
    window, unbounded = pipe(**given), pipe(**given, kv_max_frames=UNBOUNDED)
    pipe.enable_packforcing("sana-wm", sink_frames=given.get("sink_size", 1))
    assert distance(pipe(**given), window) <= 1e-5
    pipe.enable_packforcing("full")
    assert distance(pipe(**given), unbounded) <= 1e-5
    assert distance(window, unbounded) > 1e-3  # what is compared depends on the memory


def test_the_window_may_have_another_length(pipe):
    wanted = pipe(**arguments(), kv_max_frames=6)
    pipe.enable_packforcing("sana-wm", window_frames=6)
    assert distance(pipe(**arguments()), wanted) <= 1e-5


def test_noise_is_upstreams(pipe):
    """One generator draws for all blocks; without one its seed is upstream's."""
    pipe.enable_packforcing("sana-wm")
    assert torch.equal(pipe(**arguments()), pipe(**arguments(), generator=seeded(42)))


def test_decodes_as_upstream(pipe):
    for kind in ("np", "pt", "pil"):
        given = arguments(9, output_type=kind)
        wanted = pipe(**given)
        frames = pipe.enable_packforcing("sana-wm")(**given)
        pipe.disable_packforcing()
        assert type(frames) is type(wanted)
        assert np.array_equal(np.stack(list(map(np.asarray, frames))), np.stack(list(map(np.asarray, wanted))))
    assert pipe(**given)[0].size == (96, 64)


def test_without_a_vae_latents_come_whatever_is_asked_for():
    pipe = refiner(vae=False)
    given = arguments(9, output_type="np")
    wanted = pipe(**given)
    pipe.enable_packforcing("sana-wm")
    assert torch.equal(pipe(**given), wanted)
    assert torch.equal(torch.cat(list(pipe.packforcing.stream(**given)), dim=2), wanted)


def test_a_row_of_a_batch_is_that_row_alone(pipe):
    """Upstream itself takes one video."""
    seeds = [seeded(seed) for seed in (1, 2)]
    pipe.enable_packforcing(sink_frames=4, recent_frames=3, topk=1)
    together = pipe(**arguments(batch=2, generator=seeds))
    raw = arguments(batch=2)["sana_latent"]
    for row in range(2):
        alone = {**arguments(), "sana_latent": raw[row : row + 1]}
        assert torch.equal(pipe(**alone, generator=seeded(row + 1)), together[row : row + 1])


def test_the_prompt_is_encoded_once_and_forwards_are_not_repeated(pipe):
    """A block is three steps and a commit; the sink is captured once; what is short and last is not committed."""
    heard, modes = [], []
    pipe.text_encoder.register_forward_hook(lambda *_: heard.append(1))
    pipe.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: modes.append(kwargs["kv_cache_mode"]), with_kwargs=True
    )
    pipe.enable_packforcing()(**arguments(12))
    block = ["inject"] * 3
    clean = "inject_and_capture_post_rope"
    assert len(heard) == 1
    assert modes == ["capture_pre_rope", *block, clean, *block, clean, *block, clean, *block]


@dataclass(frozen=True)
class Alone(StateMemory):
    """A block attends nothing but itself."""

    chunk_frames: int = 3
    name = "alone"

    def start(self, geometry, layer):
        return 0

    def attend(self, state, chunk):
        return Attended((), float(chunk.first_frame), state)

    def remember(self, state, chunk):
        return 0

    def veto(self, state, latents):
        return torch.full((latents.shape[0],), state == 0), state + 1


class Doubting(Alone):
    """Vetoes every first try."""

    max_retries = 1


def test_what_a_memory_vetoes_is_made_again_of_the_same_noise(pipe):
    forwards = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: forwards.append(kwargs["kv_cache_mode"]), with_kwargs=True
    )
    accepted = pipe.enable_packforcing(Alone())(**arguments(13))
    assert forwards.count("inject") == 4 * 3
    forwards.clear()
    vetoed = pipe.enable_packforcing(Doubting())(**arguments(13))
    assert forwards.count("inject") == 4 * 3 * 2
    assert torch.equal(vetoed, accepted)


def test_a_first_block_that_holds_nan_is_made_again_behind_one_sink(pipe, monkeypatch):
    pipe.enable_packforcing("full")
    check, tries = SanaWMDenoiser.check_finite, []

    def spoiled(denoiser, latents, index):
        tries.append(index)
        return check(denoiser, latents * torch.nan if len(tries) == 1 else latents, index)

    monkeypatch.setattr(SanaWMDenoiser, "check_finite", spoiled)
    assert pipe(**call(2), on_nan="retry").shape[2] == 7
    assert tries == [0, 0, 1]
    assert pipe.packforcing.stats()["frames"] == 7


def test_stats_say_what_is_kept(pipe):
    pipe.enable_packforcing("sana-wm")
    pipe(**arguments(25))
    stats = pipe.packforcing.stats()
    frame = 6
    assert (stats["frames"], stats["chunks"]) == (25, 9)
    assert (stats["sink_tokens"], stats["recent_tokens"], stats["attended_tokens"]) == (frame, 10 * frame, 11 * frame)
    assert stats["branches"] == ["cond"]
    assert all(stats["seconds"][phase] > 0 for phase in ("denoise", "commit"))


@pytest.mark.parametrize("options", [{"commit": "last-step"}, {"reindexer": "absolute", "topk": 1}])
def test_other_memories_of_packforcing(pipe, options):
    pipe.enable_packforcing(sink_frames=2, recent_frames=3, **options)
    latents = pipe(**arguments())
    assert bool(latents.isfinite().all())
    pipe.enable_packforcing("full")
    assert distance(pipe(**arguments()), latents) > 1e-3


def test_the_pipeline_stays_itself(pipe, tmp_path):
    """Copies, offloading, another dtype and backend are upstream's; what is saved is the stock pipeline."""
    wanted = pipe(**arguments())
    enabled = copy.copy(pipe).enable_packforcing("sana-wm")
    assert torch.equal(copy.deepcopy(enabled)(**arguments()), enabled(**arguments()))
    enabled.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is SanaWMLTX2Refiner
    assert torch.equal(loaded(**arguments()), wanted)
    loaded.enable_model_cpu_offload(device="cpu")
    loaded.enable_packforcing("sana-wm")
    for _ in range(2):
        assert distance(loaded(**arguments()), wanted) <= 1e-5
    pipe.to(dtype=torch.bfloat16)
    with attention_backend("native"):  # what is active in the process is then as before
        pipe.transformer.set_attention_backend("_native_math")
        wanted = pipe(**arguments())
        latents = pipe.enable_packforcing("sana-wm")(**arguments())
    assert latents.dtype == torch.bfloat16
    assert distance(latents, wanted) <= 2e-2


def test_a_prompt_schedule_is_the_same_as_sending(pipe):
    """At 16 fps block k begins in pixel frame 24k + 1: 4.5 seconds are the third block's beginning."""
    pipe.enable_packforcing()
    alone = pipe(**arguments())
    schedule = [(0, PROMPT), (4.5, "the blue square", "cut")]
    scheduled = pipe(**{**arguments(), "prompt": schedule})
    stream = pipe.packforcing.stream(**arguments())
    parts = [next(stream) for _ in range(3)]
    parts += [stream.send("the blue square", cut=True), *stream]
    assert torch.equal(torch.cat(parts, dim=2), scheduled)
    assert torch.equal(scheduled[:, :, :10], alone[:, :, :10])
    assert not torch.equal(scheduled[:, :, 10:13], alone[:, :, 10:13])
