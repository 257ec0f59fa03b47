"""Guidance branches over two processes: the bits of one process, and half of its memory each."""

import pytest
import torch
import torch.distributed as dist

import kvpack
from helpers import SMALL, quiet, seeded
from kvpack.errors import InvalidOptionError, PolicyError, SnapshotError, UnsupportedPipelineError
from kvpack.policies.h2o import HeavyHitters
from kvpack.testing import tiny_skyreels_v2_pipeline, tiny_wan_pipeline
from kvpack.testing.ranks import RanksFailed, run_ranks

CALL = {
    "prompt": [(0, "a red circle"), (1.5, "the blue square", "cut")],
    "negative_prompt": "night",
    "height": 32,
    "width": 32,
    "num_frames": 53,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
MEMORIES = {
    "keep-farthest": ("packforcing", {**SMALL, "compressor": "keep-farthest", "keep_tokens": 2}),
    "lr": ("packforcing", {**SMALL, "compressor": "lr", "selector": "topk"}),
    "h2o": ("h2o", {"chunk_frames": 2, "budget_frames": 6, "recent_frames": 2}),
    "longlive": ("longlive", {"chunk_frames": 2, "window_frames": 6}),  # computes anew under a new prompt
}


def generated(name, options, split, **changed):
    pipe = kvpack.enable(quiet(tiny_wan_pipeline()), name, **options)
    if split:
        pipe.packforcing.guidance_group = dist.group.WORLD
    seen = []
    video = pipe(
        generator=seeded(), on_chunk=lambda _: seen.append(sorted(pipe.packforcing.sessions)), **{**CALL, **changed}
    )
    stats = pipe.packforcing.stats()
    return {"latents": video.frames, "held": stats["resident_bytes"], "sent": stats.get("sent_bytes"), "seen": seen[-1]}


@pytest.mark.parametrize("name", MEMORIES)
def test_two_processes_make_the_video_of_one_with_half_of_its_memory_each(name):
    alone = generated(*MEMORIES[name], split=False)
    both = run_ranks(2, lambda rank: generated(*MEMORIES[name], split=True))
    assert alone["seen"] == ["cond", "uncond"]
    assert [each["seen"] for each in both] == [["cond"], ["uncond"]]
    for each in both:
        assert torch.equal(each["latents"], alone["latents"])
        assert each["held"] < 0.6 * alone["held"]  # the workspace for rotated keys is in both
    chunks, steps, each = 7, CALL["num_inference_steps"], 16 * 2 * 4 * 4 * 4  # bytes of a chunk's latents
    assert both[0]["sent"]["gathers"] == chunks * steps * each


def test_what_cannot_be_split_is_refused():
    def work(rank):
        group, said = dist.group.WORLD, []
        with pytest.raises(InvalidOptionError, match="2 processes, but this call has 1 guidance branches"):
            generated("packforcing", SMALL, split=True, guidance_scale=1.0)
        with pytest.raises(UnsupportedPipelineError, match="vetoes chunks"):
            generated("token-trim", {"chunk_frames": 2, "max_retries": 1}, split=True)
        sky = kvpack.enable(quiet(tiny_skyreels_v2_pipeline()))
        with pytest.raises(UnsupportedPipelineError, match="run in one process; WanPipeline splits them"):
            sky.packforcing.guidance_group = group
        pipe = kvpack.enable(quiet(tiny_wan_pipeline()), "packforcing", **SMALL)
        pipe.packforcing.guidance_group = group
        with pipe.packforcing.stream(generator=seeded(), **CALL) as stream:
            next(stream)
            for refused in (lambda: stream.save("nowhere"), stream.fork):
                with pytest.raises(SnapshotError, match="no snapshot holds both"):
                    refused()
        kvpack.enable(pipe, "streaming-llm")
        said.append(pipe.packforcing.guidance_group is group)
        return said

    assert run_ranks(2, work) == [[True], [True]]


def test_an_error_on_one_process_is_one_on_both_and_nothing_is_committed():
    def work(rank):
        pipe = kvpack.enable(quiet(tiny_wan_pipeline()), "packforcing", **SMALL, compressor="pool", selector="topk")
        pipe.packforcing.guidance_group = dist.group.WORLD
        stream = pipe.packforcing.stream(generator=seeded(), **CALL)
        for _ in range(6):
            next(stream)  # the archive is full
        (session,) = pipe.packforcing.sessions.values()
        held = session.past.states[0].archive.keys[0].clone()
        if rank == 1:

            def broken():
                raise RuntimeError("broken here")

            session.prepared = broken
        with pytest.raises((RuntimeError, PolicyError)) as raised:
            next(stream)
        return [
            str(raised.value),
            session.frames,
            bool((session.past.states[0].archive.keys[0] == held).all()),
            type(pipe.transformer.blocks[0].attn1.processor).__name__,
        ]

    first, second = run_ranks(2, work)
    assert "another rank than this one, 0 of 2, has failed" in first[0]
    assert second[0] == "broken here"
    assert first[1:] == second[1:] == [12, True, "WanAttnProcessor"]


@pytest.mark.parametrize("steps", [2, 3])  # the chunk's last step, or one in between
def test_a_pipeline_that_leaves_guidance_out_of_a_step_is_told(steps):
    def work(rank):
        pipe = kvpack.enable(quiet(tiny_wan_pipeline()), "packforcing", **SMALL)
        pipe.packforcing.guidance_group = dist.group.WORLD

        def leave_out(pipe, step, timestep, tensors):
            pipe._guidance_scale = 1.0
            return tensors

        call = {**CALL, "num_inference_steps": steps, "callback_on_step_end": leave_out}
        pipe(generator=seeded(), **call)

    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, work)
    assert all("asked for branch cond, but not for uncond" in each for each in failed.value.errors.values())


def test_nan_of_one_branch_ends_both_processes_though_nan_is_retried():
    def work(rank):
        class Wrong(HeavyHitters):
            def attend(self, state, chunk):
                made = super().attend(state, chunk)
                if rank and chunk.index == 2:
                    made.tokens[0].keys[:] = torch.nan
                return made

        pipe = kvpack.enable(quiet(tiny_wan_pipeline()), Wrong(**MEMORIES["h2o"][1]))
        pipe.packforcing.guidance_group = dist.group.WORLD
        with pytest.raises(PolicyError) as raised:
            pipe(generator=seeded(), on_nan="retry", **CALL)
        return str(raised.value)

    first, second = run_ranks(2, work)
    assert "another rank than this one" in first
    assert "keys for layer 0 that are not finite" in second


def test_a_group_must_be_there_and_hold_the_process():
    pipe = kvpack.enable(quiet(tiny_wan_pipeline()))
    with pytest.raises(InvalidOptionError, match="init_process_group"):
        pipe.packforcing.guidance_group = object()
