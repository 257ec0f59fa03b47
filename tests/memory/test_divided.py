"""Windows that differ by layer and by head: against plain windows, against one masked attention, and in bytes."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import kvpack
from helpers import generated, quiet, row_seeds, same, seeded
from kvpack.errors import InvalidOptionError, UnsupportedPipelineError
from kvpack.memory.geometry import Geometry
from kvpack.memory.rope import rotate, rotations
from kvpack.memory.session import Session
from kvpack.memory.sharded import require_by_head
from kvpack.planning.planner import plan
from kvpack.planning.resident import most_resident
from kvpack.plugins.resolve import resolve_stack
from kvpack.policies.mixed_windows import MixedWindows
from kvpack.policies.stacks import self_forcing
from kvpack.shipped import demo_stack
from kvpack.testing import (
    check_policy,
    run_session,
    tiny_anyflow_far_pipeline,
    tiny_sana_wm_refiner,
    tiny_skyreels_v2_pipeline,
    tiny_wan_pipeline,
)

FOUR = Geometry(layers=3, heads=4, head_dim=12, grid=(2, 3), rope_split=(4, 4, 4))
HEADS = MixedWindows(windows=(6, 15), sinks=(1, 3), shares=((0, 1, 1, 0), (1,), (1, 0, 0, 0)))
LAYERS = MixedWindows(windows=(6, 15), shares=((0,), (1,)))


@pytest.mark.parametrize("memory", [MixedWindows(), HEADS, LAYERS, MixedWindows(windows=(6, 9), shares=((0, 1), (1,)))])
def test_the_contract_is_kept(memory):
    check_policy(memory)


def test_one_group_is_the_plain_window_to_the_bit():
    mixed = run_session(Session(MixedWindows(windows=(9,), shares=((0,),)), FOUR), 9, batch=2)
    plain = run_session(Session(self_forcing(window_frames=9, sink_frames=3), FOUR), 9, batch=2)
    assert same(mixed, plain)


def test_a_window_that_no_share_names_is_refused():
    with pytest.raises(InvalidOptionError, match=r"no share of mixed-windows names \[1\]"):
        MixedWindows(windows=(9, 6), shares=((0,),))


def test_two_groups_of_one_window_are_that_window():
    mixed = run_session(Session(MixedWindows(windows=(9, 9), shares=((0, 1, 1, 0),)), FOUR), 9, batch=2)
    plain = run_session(Session(self_forcing(window_frames=9, sink_frames=3), FOUR), 9, batch=2)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(mixed, plain, strict=True))


def masked(memory, layer, chunks, queries, keys, values):
    """Attention to all of the past at once, with a mask for each head; keys of all chunks are before RoPE."""
    frame, frames = FOUR.tokens_per_frame, memory.chunk_frames * chunks
    places = torch.cartesian_prod(torch.arange(frames), torch.arange(2), torch.arange(3)).double()[None]
    turned = rotate(torch.cat(keys, dim=1), rotations(places, FOUR))
    own = rotate(queries, rotations(places[:, -queries.shape[1] :], FOUR))
    share = memory.shares[layer % len(memory.shares)]
    at, mask = torch.arange(frames * frame) // frame, []
    for head in range(FOUR.heads):
        window = share[head % len(share)]
        sink = memory.sinks[window % len(memory.sinks)]
        mask.append((at < sink) | (at >= frames - (memory.windows[window] - sink)))
    q, k, v = (each.transpose(1, 2) for each in (own, turned, torch.cat(values, dim=1)))
    return scaled_dot_product_attention(q, k, v, torch.stack(mask)[None, :, None]).transpose(1, 2)


@pytest.mark.parametrize("memory", [HEADS, LAYERS, replace(HEADS, shares=((1, 0),), sinks=(3, 0))])
def test_groups_are_one_attention_with_a_mask_for_each_head(memory):
    session, generator = Session(memory, FOUR), seeded()
    past = [([], []) for _ in range(FOUR.layers)]
    worst = 0.0
    for chunk in range(9):
        for announce in (lambda: session.denoise(0), lambda: session.denoise(1), session.commit):
            layers, tokens = announce(), 3 * FOUR.tokens_per_frame
            made = torch.randn(len(layers), 3, 2, tokens, FOUR.heads, FOUR.head_dim, generator=generator)
            for index, (layer, (q, k, v)) in enumerate(zip(layers, made, strict=True)):
                keys, values = past[index]
                wanted = masked(memory, index, chunk + 1, q, [*keys, k], [*values, v])
                given = layer.attend(q, k, v, plain_attention)
                worst = max(worst, float((given - wanted).abs().max()))
        for (keys, values), (_, k, v) in zip(past, made, strict=True):
            keys.append(k)
            values.append(v)
        session.finish_commit()
    assert 0 < worst < 1e-6


def plain_attention(queries, keys, values):
    return scaled_dot_product_attention(*(each.transpose(1, 2) for each in (queries, keys, values))).transpose(1, 2)


@pytest.mark.parametrize("memory", [HEADS, LAYERS, MixedWindows()])
def test_bytes_are_those_of_each_heads_own_window(memory):
    session = Session(memory, FOUR)
    run_session(session, 9, batch=2)
    stats, token_head = session.stats(), 2 * FOUR.head_dim * 4 * FOUR.tokens_per_frame
    windows = [
        memory.windows[share[head % len(share)]]
        for share in (memory.shares[layer % len(memory.shares)] for layer in range(FOUR.layers))
        for head in range(FOUR.heads)
    ]
    # Keys lie rotated, with room for the chunk that is part of the window; nothing else is held.
    assert stats["resident_bytes"] == 2 * token_head * sum(windows)
    assert stats["attended_bytes"] == 2 * token_head * sum(window - 3 for window in windows)
    planned = plan(FOUR, memory, 27, batch=2)
    assert planned.resident_kv_bytes == stats["resident_bytes"]
    assert planned.attended_kv_bytes == stats["attended_bytes"]
    assert planned.attended_tokens == stats["attended_tokens"] + planned.chunk_tokens
    assert most_resident(FOUR, memory, None, 2).bytes(FOUR.layers) == stats["resident_bytes"]


@pytest.mark.parametrize("memory", [MixedWindows(), demo_stack("mixed-windows")])
def test_every_head_attends_a_chunk_of_history_beside_the_sink_unless_told_otherwise(memory):
    for stack in memory.stacks:
        chunk = stack.chunk_frames
        sink, recent = stack.partitioner.partition(10 * chunk, chunk)
        assert (sink.part, recent.part) == ("sink", "recent")
        assert len(sink.frames) == chunk
        assert len(recent.frames) >= chunk


def test_what_a_layer_attends_is_that_of_its_parts_by_head_and_0_behind_it():
    session, seen = Session(HEADS, FOUR), []

    def look(session):
        keys, values = (each.clone() for each in session.attended(0))
        heads = [head for part in HEADS.parts(FOUR)[0] for head in part.heads]
        assert sorted(heads) == [0, 1, 2, 3]
        for part, cache in zip(HEADS.parts(FOUR)[0], session.caches[0].leaves, strict=True):
            for every, own in zip((keys, values), cache.context.history(), strict=True):
                mine = every[:, :, list(part.heads)]
                assert torch.equal(mine[:, : own.shape[1]], own)
                assert not mine[:, own.shape[1] :].any()
        lengths = zip(*(cache.context.lengths for cache in session.caches[0].leaves), strict=True)
        seen.append((keys.shape[1], [max(row) for row in lengths]))

    run_session(session, 6, batch=2, inspect=look)
    # Chunks of 3 frames of 6 tokens; the longest window has 15 frames, the chunk's own among them.
    assert seen == [(18 * chunks, [18 * chunks] * 2) for chunks in (0, 1, 2, 3, 4, 4)]


def test_short_windows_hold_less():
    held = {}
    for name, memory in (("heads", HEADS), ("long", self_forcing(window_frames=15, sink_frames=3))):
        session = Session(memory, FOUR)
        run_session(session, 9)
        held[name] = session.stats()["resident_bytes"]
    # 5 of 12 heads have 6 of 15 frames: (5 * 6 + 7 * 15) / (12 * 15).
    assert held["heads"] / held["long"] == (5 * 6 + 7 * 15) / (12 * 15)


CALL = {
    "prompt": ["a red circle", "the blue square"],
    "height": 32,
    "width": 32,
    "num_frames": 61,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "output_type": "latent",
}


def wan():
    return tiny_wan_pipeline(), {**CALL, "max_sequence_length": 8}


def skyreels():
    return tiny_skyreels_v2_pipeline(), {**CALL, "max_sequence_length": 8}


def anyflow():
    return tiny_anyflow_far_pipeline(), {**CALL, "guidance_scale": 1.0, "max_sequence_length": 8}


@pytest.mark.parametrize("family", [wan, skyreels, anyflow])
def test_every_family_streams_and_resumes(family, tmp_path):
    memory = MixedWindows(windows=(6, 9), sinks=(1, 3), shares=((0, 1), (1,)))

    def enabled():
        pipe, call = family()
        return kvpack.enable(quiet(pipe), memory), call

    pipe, call = enabled()
    whole = generated(pipe, **{**call, "generator": row_seeds()})
    held = pipe.packforcing.stats()["resident_bytes"]
    stream = pipe.packforcing.stream(**{**call, "generator": row_seeds()})
    first = [next(stream) for _ in range(3)]
    stream.save(tmp_path / "at3")
    with stream.fork() as other:
        assert torch.equal(torch.cat([*first, *other], dim=2), whole)
    assert torch.equal(torch.cat([*first, *stream], dim=2), whole)
    stream.rewind(3)
    assert torch.equal(torch.cat([*first, *stream], dim=2), whole)
    resumed, _ = enabled()
    rest = list(resumed.packforcing.resume(tmp_path / "at3"))
    assert torch.equal(torch.cat([*first, *rest], dim=2), whole)
    kvpack.enable(pipe, replace(memory, windows=(9,), sinks=(3,), shares=((0,),)))
    other = generated(pipe, **{**call, "generator": row_seeds()})
    assert not torch.equal(other, whole)
    assert held < pipe.packforcing.stats()["resident_bytes"]


def refined(memory):
    pipe = kvpack.enable(quiet(tiny_sana_wm_refiner()), memory)
    latents = torch.randn(1, 4, 13, 2, 3, generator=seeded())
    return pipe(sana_latent=latents, prompt="the red circle", fps=16.0, output_type="latent")


def test_a_model_whose_heads_have_their_own_rotations_is_divided_by_layer_only():
    memory = MixedWindows(windows=(6, 12), sinks=(1,), shares=((0,), (1,)))
    assert bool(torch.as_tensor(refined(memory)).isfinite().all())
    with pytest.raises(InvalidOptionError, match="rotations of its own"):
        refined(replace(memory, shares=((0, 1),)))


def test_heads_that_differ_are_not_split_over_processes():
    require_by_head(LAYERS)
    with pytest.raises(UnsupportedPipelineError, match="mixed-windows"):
        require_by_head(HEADS)


def test_it_is_read_back_from_json():
    assert resolve_stack(json.loads(json.dumps(HEADS.to_dict())), {}) == HEADS
    assert replace(HEADS, chunk_frames=2).stacks[0].chunk_frames == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"windows": ()}, "got 1 sinks and 0 windows"),
        ({"sinks": (1, 2, 3)}, "got 3 sinks and 2 windows"),
        ({"windows": (4, 21)}, "window_frames must be at least"),
        ({"shares": ((0, 2),)}, "numbers from 0 to 1"),
        ({"shares": ((True,),)}, "numbers from 0 to 1"),
        ({"shares": ((0,), ())}, "numbers from 0 to 1"),
        ({"shares": ()}, "numbers from 0 to 1"),
    ],
)
def test_wrong_options_are_refused(options, told):
    with pytest.raises(InvalidOptionError, match=told):
        MixedWindows(**options)
