"""SkyReels-V2 diffusion forcing from text: equal to upstream's own masked forward, and nothing left behind."""

from collections import Counter
from functools import partial

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from helpers import distance, generated, quiet, seeded
from kvpack.errors import InvalidOptionError, UnsupportedPipelineError
from kvpack.memory.session import Session
from kvpack.plugins.registry import registry
from kvpack.policies.token_trim import TokenTrim
from kvpack.testing import check_adapter, tiny_skyreels_v2_pipeline

PROMPTS = ["a red circle", "the blue square"]
CALL = {
    "prompt": PROMPTS[0],
    "height": 32,
    "width": 48,
    "num_frames": 45,  # 12 latent frames: three chunks of four
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
FULL = {"stack": "full", "chunk_frames": 4}


generate = partial(generated, **CALL)


def made(**options):
    return quiet(tiny_skyreels_v2_pipeline(**options))


@pytest.fixture
def pipe():
    return made()


def upstream(pipe, noise, block, **changed):
    """Upstream's strictly sequential schedule over the whole video, every frame in every step, under its own mask."""
    steps = {**CALL, **changed}["num_inference_steps"]
    pipe.prepare_latents = lambda *_, **__: (noise.clone(), noise.shape[2], None, 0)
    try:
        return generate(pipe, num_frames=4 * noise.shape[2] - 3, ar_step=steps, causal_block_size=block, **changed)
    finally:
        del pipe.prepare_latents
        pipe.transformer.register_to_config(num_frame_per_block=1)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("block", [2, 4])
def test_equals_upstreams_masked_forward(block, rows, guidance_scale, pipe):
    noise = torch.randn(rows, 16, 8, 4, 6, generator=seeded())
    changed = {"prompt": PROMPTS[:rows], "guidance_scale": guidance_scale, "num_inference_steps": 3}
    wanted = upstream(pipe, noise, block, **changed)
    pipe.enable_packforcing("full", chunk_frames=block)
    given = generate(pipe, latents=noise, **changed)
    assert distance(given, wanted) < 1e-5
    alone = generate(pipe, latents=noise[:, :, block:], **changed)
    assert distance(alone[:, :, :block], wanted[:, :, block : 2 * block]) > 1e-2  # the history is attended


@pytest.mark.parametrize("fps", [16, 24])
def test_equals_upstream_where_the_model_hears_the_frame_rate(fps):
    pipe, noise = made(inject_sample_info=True), torch.randn(1, 16, 8, 4, 6, generator=seeded())
    wanted, other = (upstream(pipe, noise, 4, guidance_scale=4.0, fps=each) for each in (fps, 40 - fps))
    pipe.enable_packforcing(**FULL)
    given = generate(pipe, latents=noise, guidance_scale=4.0, fps=fps)
    assert distance(given, wanted) < 1e-5
    assert distance(given, other) > 1e-3


def test_a_batch_hears_the_frame_rate_too():
    """Which fails upstream."""
    pipe, noise = made(inject_sample_info=True), torch.randn(2, 16, 8, 4, 6, generator=seeded())
    with pytest.raises(RuntimeError, match="must match the size"):
        upstream(pipe, noise, 4, prompt=PROMPTS)
    pipe.enable_packforcing(**FULL)
    both = generate(pipe, prompt=PROMPTS, latents=noise)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(pipe, prompt=prompt, latents=noise[row : row + 1])
        assert distance(both[row : row + 1], alone) < 1e-5


def test_check_adapter():
    pipe, size = made(), {"height": 16, "width": 16, "guidance_scale": 2.0}

    def call(chunks):
        return {**CALL, **size, "num_frames": 16 * chunks - 3, "base_num_frames": 400, "generator": seeded()}

    generator = seeded()
    noise = torch.cat([torch.randn(1, 16, 4, 2, 2, generator=generator) for _ in range(3)], dim=2)
    check_adapter(
        pipe, call, identity=(registry().stack("full", {"chunk_frames": 4}), upstream(pipe, noise, 4, **size))
    )


@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_one_chunk_is_the_stock_video(output_type, pipe):
    changed = {"num_frames": 13, "output_type": output_type, "guidance_scale": 4.0, "prompt": PROMPTS}
    stock = torch.as_tensor(generate(pipe, **changed))
    pipe.enable_packforcing(**FULL)
    given = pipe(**{**CALL, **changed, "generator": seeded()})
    assert type(given).__name__ == "SkyReelsV2PipelineOutput"
    assert distance(torch.as_tensor(given.frames), stock) < 1e-5


def test_committed_frames_are_never_forwarded_again(pipe):
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append((kwargs["hidden_states"].shape[2], bool((kwargs["timestep"] == 0).all()))),
        with_kwargs=True,
    )
    pipe.enable_packforcing(**FULL)
    generate(pipe, guidance_scale=4.0)
    handle.remove()
    denoised, committed = [(4, False)] * 2 * 2, [(4, True)] * 2  # steps and branches
    assert seen == [*denoised, *committed] * 3


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_24_times_the_native_length_in_flat_memory(guidance_scale, pipe):
    pipe.enable_packforcing("packforcing", chunk_frames=5, archive_blocks=16)
    call = {**CALL, "height": 16, "width": 16, "num_frames": 2397, "guidance_scale": guidance_scale}
    held, frames = [], 0
    for latents in pipe.packforcing.stream(generator=seeded(), **call):
        stats, frames = pipe.packforcing.stats(), frames + latents.shape[2]
        held.append((stats["attended_tokens"], stats["resident_bytes"]))
        assert bool(latents.isfinite().all())
    assert frames == 24 * 25  # latents of the native 97 frames
    assert len(held) == 120
    assert len(set(held[40:])) == 1


def test_steps_are_counted(pipe, monkeypatch):
    """Upstream does not tell them; mid blocks are chosen at step 0 only."""
    steps, denoise = [], Session.denoise
    monkeypatch.setattr(Session, "denoise", lambda self, step: (steps.append(step), denoise(self, step))[1])
    pipe.enable_packforcing(**FULL)
    generate(pipe, guidance_scale=3.0, num_inference_steps=3)
    assert steps == [0, 0, 1, 1, 2, 2] * 3
    steps.clear()
    generate(pipe, num_inference_steps=3)
    assert steps == [0, 1, 2] * 3


def test_a_vetoed_chunk_begins_with_its_first_step_again(pipe, monkeypatch):
    steps, denoise = [], Session.denoise
    monkeypatch.setattr(Session, "denoise", lambda self, step: (steps.append(step), denoise(self, step))[1])
    monkeypatch.setattr(TokenTrim, "veto", lambda _, state, latents: (torch.ones(latents.shape[0]) > 0, state))
    noise = torch.randn(1, 16, 8, 4, 6, generator=seeded())
    wanted = upstream(pipe, noise, 4)
    pipe.enable_packforcing("token-trim", chunk_frames=4, window_frames=12)
    given = generate(pipe, latents=noise)  # the same noise in both tries, although upstream writes into it
    assert steps == [0, 1] * 2 * 2  # tries and chunks
    assert distance(given, wanted) < 1e-5


def test_the_chunk_is_the_causal_block(pipe):
    pipe.enable_packforcing("full", chunk_frames=3)
    wanted = generate(pipe)
    pipe.enable_packforcing(**FULL)
    assert torch.equal(generate(pipe, causal_block_size=3), wanted)
    assert pipe.packforcing.stats()["chunks"] == 4
    pipe.transformer.register_to_config(num_frame_per_block=3)  # as a checkpoint, or an earlier stock call, may
    assert torch.equal(generate(pipe), wanted)
    assert torch.equal(generate(pipe, causal_block_size=4), generate(pipe, causal_block_size=4, ar_step=2))
    assert pipe.packforcing.stats()["chunks"] == 3
    assert pipe.packforcing.stack.chunk_frames == 4


def fail(*_):
    raise ZeroDivisionError


def failing(pipe):
    with pytest.raises(ZeroDivisionError):
        generate(pipe, callback_on_step_end=fail)


def stopped(pipe, *_):
    pipe._interrupt = True
    return {}


ENDINGS = {
    "done": generate,
    "interrupted": lambda pipe: generate(pipe, callback_on_step_end=stopped),
    "closed": lambda pipe: (stream := pipe.packforcing.stream(**CALL), next(stream), stream.close()),
    "failed": failing,
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_config_and_the_bits_are_those_of_before(blocks, ending, pipe):
    pipe.transformer.register_to_config(num_frame_per_block=blocks)
    before, stock = dict(pipe.transformer.config), generate(pipe)
    masks, inside = [], []
    handles = [
        pipe.transformer.register_forward_pre_hook(lambda each, _: inside.append(each.config.num_frame_per_block)),
        pipe.transformer.blocks[0].attn1.register_forward_pre_hook(lambda _, args: masks.append(args[2])),
    ]
    pipe.enable_packforcing("full", chunk_frames=3)
    ENDINGS[ending](pipe)
    assert set(inside) == {1}
    assert set(masks) == {None}  # none was made
    for handle in handles:
        handle.remove()
    assert dict(pipe.transformer.config) == before
    pipe.disable_packforcing()
    assert torch.equal(generate(pipe), stock)
    assert dict(pipe.transformer.config) == before


WRONG = {
    "several blocks at once": ({"ar_step": 1}, r"pass ar_step=0, or ar_step=2"),
    "no step": ({"ar_step": -1}, r"ar_step must be >= 0, got -1"),
    "noisy history": ({"addnoise_condition": 20}, r"pass addnoise_condition=0"),
    "no frame rate": ({"fps": 0}, r"fps must be > 0, got 0"),
    "no block": ({"causal_block_size": 0}, r"causal_block_size must be >= 1, got 0"),
    "no overlap": ({"overlap_history": 0}, r"overlap_history must be >= 1, got 0"),
    "block and stack": ({"causal_block_size": 40}, r"causal_block_size 40 does not go with .*self-forcing.*=4"),
    "first chunk": ({"causal_block_size": 1}, r"a chunk has 1 to 1 latent frames"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_say_what_to_pass(case, pipe):
    changed, words = WRONG[case]
    pipe.enable_packforcing("self-forcing", chunk_frames=4, window_frames=12)
    pipe.packforcing.first_chunk_frames = 2
    forwards = Counter()
    handle = pipe.text_encoder.register_forward_pre_hook(lambda *_: forwards.update(["text"]))
    with pytest.raises(InvalidOptionError, match=words):
        generate(pipe, **changed)
    handle.remove()
    assert case == "first chunk" or not forwards  # nothing was computed


def test_upstreams_own_errors_come_through(pipe):
    pipe.enable_packforcing(**FULL)
    with pytest.raises(ValueError, match="divisible by 16"):
        generate(pipe, height=20)
    with pytest.raises(UnsupportedPipelineError, match="skyreels-v2 cannot train yet"):
        registry().adapter(type(pipe)).trainee(pipe)


def test_what_upstream_needs_for_long_videos_is_not_needed(pipe):
    pipe.enable_packforcing("full", chunk_frames=4)
    wanted = generate(pipe)
    assert torch.equal(generate(pipe, base_num_frames=13), wanted)
    assert torch.equal(generate(pipe, base_num_frames=13, overlap_history=9), wanted)


def test_a_schedulers_steps_are_each_chunks_own(pipe):
    """Multistep schedulers remember; a chunk's frames have copies of their own."""
    for scheduler in (pipe.scheduler, DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)):
        pipe.scheduler = scheduler
        noise = torch.randn(1, 16, 8, 4, 6, generator=seeded())
        wanted = upstream(pipe, noise, 4, num_inference_steps=5)
        pipe.enable_packforcing(**FULL)
        given = generate(pipe, latents=noise, num_inference_steps=5)
        pipe.disable_packforcing()
        assert distance(given, wanted) < 1e-5


def test_callbacks_are_given_the_users_pipeline(pipe):
    """What they replace stays replaced, and latents that are given stay as they were."""
    pipe.enable_packforcing(**FULL)
    noise = torch.randn(1, 16, 12, 4, 6, generator=seeded())
    before, calls = noise.clone(), []

    def callback(given, step, timestep, tensors):
        calls.append((given is pipe, step, tuple(tensors["latents"].shape), tuple(timestep.shape)))
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    names = ["latents", "prompt_embeds"]
    changed = generate(pipe, latents=noise, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert calls == [(True, step, (1, 16, 4, 4, 6), (4,)) for _ in range(3) for step in range(2)]
    assert torch.equal(noise, before)
    assert distance(changed, generate(pipe, latents=noise)) > 1e-3


def test_a_schedules_seconds_are_those_of_the_calls_frame_rate(pipe):
    pipe.enable_packforcing(**FULL)
    noise, schedule = torch.randn(1, 16, 12, 4, 6, generator=seeded()), [(0, PROMPTS[0]), (0.6, PROMPTS[1])]
    plain = generate(pipe, latents=noise)
    for fps, same in ((24, 4), (48, 8)):  # 0.6 s are 14 and 29 pixel frames
        given = generate(pipe, latents=noise, prompt=schedule, fps=fps)
        assert torch.equal(given[:, :, :same], plain[:, :, :same])
        assert distance(given[:, :, same : same + 4], plain[:, :, same : same + 4]) > 1e-4


def test_interrupting_stops_at_the_chunk(pipe):
    pipe.enable_packforcing(**FULL)
    assert generate(pipe, callback_on_step_end=stopped).shape[2] == 4


def test_a_subclass_keeps_its_own_ways(pipe):
    blocks = []

    class Mine(type(pipe)):
        def generate_timestep_matrix(self, frames, *args):
            blocks.append(frames)
            return super().generate_timestep_matrix(frames, *args)

    wanted = generate(pipe.enable_packforcing(**FULL))
    pipe.disable_packforcing()
    mine = Mine(**pipe.components)
    mine.set_progress_bar_config(disable=True)
    assert torch.equal(generate(mine.enable_packforcing(**FULL)), wanted)
    assert blocks == [4, 4, 4]


def test_a_saved_pipeline_is_the_stock_one(tmp_path, pipe):
    pipe.enable_packforcing(**FULL)
    generate(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe)._kvpack_base.from_pretrained(tmp_path)
    assert type(again).__name__ == "SkyReelsV2DiffusionForcingPipeline"
    assert again.transformer.config.num_frame_per_block == 1
