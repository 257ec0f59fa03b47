"""Compressors that keep: their tokens are the block's own, at their own places, chosen as each says."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import normalize

from helpers import archived, quiet, state
from kvpack import KVBlock, Session, Span
from kvpack.errors import InvalidOptionError, PolicyError, UnusedOptionError
from kvpack.memory import stack as stack_module
from kvpack.memory.blocks import grid_coordinates
from kvpack.planning import planner
from kvpack.planning.resident import resident
from kvpack.plugins.registry import registry
from kvpack.plugins.resolve import stack_from_dict
from kvpack.policies.farthest import farthest, joined_heads, round_sizes
from kvpack.testing import TINY, check_policy, run_session, tiny_wan_pipeline

KEEPING = ("keep-attended", "keep-farthest", "keep-grid", "keep-keydiff", "keep-merge", "keep-random")
FRAMES, GRID = 4, (4, 6)
TOKENS = FRAMES * GRID[0] * GRID[1]


def policy(name, **options):
    return registry().policy("compressor", name, options)


def block(rows=2, dtype=torch.float32, seed=0):
    keys, values, queries = torch.randn(3, rows, TOKENS, 2, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return KVBlock(keys, values, Span(8, FRAMES, grid_coordinates(FRAMES, GRID)), queries)


def index_of(small, row):
    """Where each kept token sits in the block."""
    t, y, x = (
        small.span.coordinates.expand(2, -1, 3)[row].long().unbind(-1)
        if small.span.coordinates.ndim == 2
        else (small.span.coordinates[row].long().unbind(-1))
    )
    return (t * GRID[0] + y) * GRID[1] + x


@pytest.mark.parametrize("name", [*KEEPING, "pool-time"])
def test_the_contract_is_kept(name):
    check_policy(policy(name))
    if name != "pool-time":
        check_policy(policy(name, keep_tokens=16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(KEEPING) - {"keep-merge"}))
def test_kept_tokens_are_the_block_s_own_at_their_own_places(name, dtype):
    whole = block(dtype=dtype)
    small = policy(name, keep_tokens=7).compress(whole, GRID)
    assert small.keys.shape[1] == small.span.tokens == policy(name, keep_tokens=7).span(8, FRAMES, GRID).tokens
    for row in range(2):
        index = index_of(small, row)
        assert bool((index[1:] > index[:-1]).all())
        assert torch.equal(small.keys[row], whole.keys[row, index])
        assert torch.equal(small.values[row], whole.values[row, index])


@pytest.mark.parametrize(("asked", "kept"), [(None, 2), (1, 1), (0.5, 48), (0.001, 1), (96, 96), (1000, 96)])
@pytest.mark.parametrize("name", KEEPING)
def test_how_many_are_kept(name, asked, kept):
    """Of 4 frames of 4x6; `pool` makes 2 of them."""
    options = {} if asked is None else {"keep_tokens": asked}
    small = policy(name, **options).compress(block(), GRID)
    assert small.keys.shape[1] == kept
    if kept == TOKENS:
        assert torch.equal(small.keys, block().keys)


@pytest.mark.parametrize("wrong", [0, -1, 0.0, 1.0, 1.5, True])
def test_a_wrong_number_is_refused(wrong):
    with pytest.raises(InvalidOptionError, match="keep_tokens must be"):
        policy("keep-farthest", keep_tokens=wrong)


def test_farthest_is_greedy_k_centre():
    unit = joined_heads(block().keys)
    chosen = farthest(unit, GRID[0] * GRID[1], 9, rounds=9)
    for row in range(2):
        like = unit[row] @ unit[row].T
        wanted = [int((unit[row] @ unit[row].mean(0)).argmin())]
        while len(wanted) < 9:
            nearest = like[:, wanted].amax(1)
            nearest[wanted] = torch.inf
            wanted.append(int(nearest.argmin()))
        assert chosen[row].tolist() == wanted


def test_few_rounds_cover_nearly_as_well_as_many():
    """Blocks as videos have them: a place looks alike in all frames. Distance of the worst covered token, by rounds."""
    generator = torch.Generator().manual_seed(0)
    place = torch.randn(8, 1, 24, 24, generator=generator)
    keys = (place + 0.3 * torch.randn(8, FRAMES, 24, 24, generator=generator)).flatten(1, 2)
    unit = normalize(keys, dim=-1)

    def radius(rounds):
        index = farthest(unit, 24, 12, rounds)
        centres = unit.gather(1, index[..., None].expand(-1, -1, 24))
        return float((1 - (unit @ centres.transpose(1, 2)).amax(2)).amax(1).mean())

    exact, few = radius(12), radius(4)
    assert exact <= few < 1.15 * exact
    assert sum(round_sizes(182, 16)) == 182
    assert len(round_sizes(182, 16)) == 16


def test_nothing_is_kept_twice_though_all_tokens_are_alike():
    same = replace(block(), keys=torch.ones(2, TOKENS, 2, 12))
    for count in (5, 40, 95):
        small = policy("keep-farthest", keep_tokens=count).compress(same, GRID)
        assert all(len(index_of(small, row).unique()) == count for row in range(2))


def test_farthest_keeps_the_one_token_that_is_unlike_all_others():
    keys = torch.ones(2, TOKENS, 2, 12) + 0.01 * block().keys
    keys[0, 17], keys[1, 90] = -1.0, -1.0
    small = policy("keep-farthest", keep_tokens=2).compress(replace(block(), keys=keys), GRID)
    assert 17 in index_of(small, 0)
    assert 90 in index_of(small, 1)


def test_keydiff_keeps_what_is_least_like_the_mean():
    whole = block()
    unit = normalize(whole.keys, dim=-1)
    like = torch.cosine_similarity(unit, unit.mean(1, keepdim=True), dim=-1).sum(2)
    small = policy("keep-keydiff", keep_tokens=5).compress(whole, GRID)
    for row in range(2):
        assert index_of(small, row).tolist() == sorted(like[row].argsort()[:5].tolist())


def test_attended_keeps_what_queries_look_at_and_says_if_there_are_none():
    whole = block()
    queries = whole.queries.clone()
    queries[0], queries[1] = 9 * whole.keys[0, 30], 9 * whole.keys[1, 3]
    small = policy("keep-attended", keep_tokens=4).compress(replace(whole, queries=queries), GRID)
    assert 30 in index_of(small, 0)
    assert 3 in index_of(small, 1)
    with pytest.raises(TypeError, match="give the block `queries`"):
        policy("keep-attended").compress(replace(whole, queries=None), GRID)


def test_a_compressor_sees_queries_of_the_chunk_that_is_committed_if_it_asks():
    seen = []

    class Spy(type(policy("keep-attended"))):
        name = "spy"
        max_queries = 30

        def compress(self, whole, grid):
            seen.append(whole.queries)
            return super().compress(whole, grid)

    session = Session(registry().stack("packforcing", {"sink_frames": 4, "compressor": Spy()}), TINY)
    run_session(session, 3, batch=2)
    session.commit()
    chunk = torch.randn(3, 2, 80, TINY.heads, TINY.head_dim)
    for layer in session.layers:
        layer.attend(*chunk, lambda queries, keys, values: queries)
    session.finish_commit()
    assert torch.equal(seen[-1], chunk[0][:, ::3])
    assert session.caches[0].captured is None


def test_a_compressor_knows_the_layer_of_a_block():
    seen = []

    class Spy(type(policy("keep-grid"))):
        name = "spy"

        def compress(self, whole, grid):
            seen.append(whole.layer)
            return super().compress(whole, grid)

    run_session(Session(registry().stack("packforcing", {"sink_frames": 4, "compressor": Spy()}), TINY), 5)
    assert seen
    assert seen == list(range(TINY.layers)) * (len(seen) // TINY.layers)


def test_random_is_seeded_and_another_draw_for_each_block():
    whole = block()
    later = replace(whole, span=replace(whole.span, first_frame=12))
    draws = [
        index_of(policy("keep-random", keep_tokens=8, seed=seed).compress(each, GRID), 0).tolist()
        for seed, each in ((0, whole), (0, whole), (0, later), (1, whole))
    ]
    assert draws[0] == draws[1]
    assert all(a != b for a, b in pairwise(draws[1:]))


def test_a_grid_keeps_middles_of_windows():
    span = policy("keep-grid", keep_tokens=12).span(0, 4, (4, 6))
    assert span.coordinates.tolist() == [[t, y, x] for t in (1, 3) for y in (1, 3) for x in (1, 3, 5)]
    assert policy("keep-grid", keep_tokens=13).span(0, 4, (4, 6)).tokens == 12


def test_merging_averages_every_token_into_the_nearest_kept_one():
    whole = block()
    kept = policy("keep-farthest", keep_tokens=6).compress(whole, GRID)
    small = policy("keep-merge", keep_tokens=6).compress(whole, GRID)
    assert torch.equal(small.span.coordinates, kept.span.coordinates)
    unit = joined_heads(whole.keys)
    for row in range(2):
        index = index_of(kept, row)
        owner = (unit[row] @ unit[row, index].T).argmax(1)
        for each in range(6):
            torch.testing.assert_close(small.keys[row, each], whole.keys[row, owner == each].mean(0))
            torch.testing.assert_close(small.values[row, each], whole.values[row, owner == each].mean(0))


def test_pooling_over_time_averages_frames_alone():
    whole = block()
    small = policy("pool-time", keep_frames=2).compress(whole, GRID)
    cells = whole.keys.unflatten(1, (FRAMES, 24))
    torch.testing.assert_close(small.keys, torch.cat([cells[:, :2].mean(1), cells[:, 2:].mean(1)], dim=1))
    assert small.span.coordinates[-1].tolist() == [2.5, 3, 5]


def test_rows_and_layers_keep_their_own_tokens():
    session = Session(registry().stack("packforcing", {"compressor": "keep-farthest", "keep_tokens": 5}), TINY)
    run_session(session, 9, batch=2)
    first, second = (state(session, layer).archive.coordinates for layer in range(2))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert archived(session)[0][0].shape[1] == 5


@pytest.mark.parametrize("name", [*KEEPING, "pool-time"])
@pytest.mark.parametrize("batch", [1, 2])
def test_planned_bytes_are_held_bytes(name, batch):
    options = {} if name == "pool-time" else {"keep_tokens": 7}
    stack = registry().stack("packforcing", {"compressor": policy(name, **options), "topk": 2})
    session = Session(stack, TINY)
    run_session(session, 40, batch=batch)
    stats, plan = session.stats(), planner.plan(TINY, stack, 160, batch=batch)
    assert plan.archive_kv_bytes == stats["archive_bytes"]
    assert resident(TINY, stack, 40, batch).bytes(TINY.layers) == stats["resident_bytes"]


def test_packforcing_hands_the_number_through():
    made = registry().stack("packforcing", {"compressor": "keep-random", "keep_tokens": 0.25})
    assert made.compressor.keep_tokens == 0.25
    assert stack_from_dict(made.to_dict()) == made
    with pytest.raises(UnusedOptionError, match="keep_tokens has no effect: compressor 'pool' does not take it"):
        registry().stack("packforcing", {"compressor": "pool", "keep_tokens": 4})


@pytest.mark.parametrize("name", KEEPING)
def test_layers_that_are_compressed_together_keep_what_each_keeps_alone(name, monkeypatch):
    """Several layers in one call, and split over calls: what `compress` gives for each."""
    compressor, blocks = policy(name, keep_tokens=5), [block(seed=seed) for seed in range(3)]
    for one, other in zip(
        map(partial(compressor.compress, grid=GRID), blocks), compressor.compress_all(blocks, GRID), strict=True
    ):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.span.coordinates, other.span.coordinates)
    archives = []
    for together in (1, 10**6):
        monkeypatch.setattr(stack_module, "_TOGETHER", together)
        torch.manual_seed(0)
        session = Session(registry().stack("packforcing", {"compressor": name, "keep_tokens": 5}), TINY)
        run_session(session, 9, batch=2)
        archives.append([state(session, layer).archive.keys[0] for layer in range(TINY.layers)])
    assert all(torch.equal(one, other) for one, other in zip(*archives, strict=True))


def test_a_subclass_that_chooses_otherwise_is_asked_and_as_many_blocks_come_back():
    class First(type(policy("keep-farthest"))):
        name = "first"

        def choose(self, block, grid, count):
            return torch.arange(count).expand(block.keys.shape[0], -1)

    class Fewer(type(policy("keep-random"))):
        name = "fewer"

        def compress_all(self, blocks, grid):
            return []

    (made,) = First(keep_tokens=3).compress_all([block()], GRID)
    assert torch.equal(made.keys, block().keys[:, :3])
    with pytest.raises(PolicyError, match="compress_all returned 0 blocks for 2 layers"):
        run_session(Session(registry().stack("packforcing", {"compressor": Fewer()}), TINY), 9)


@pytest.mark.parametrize(
    ("method", "made", "said"),
    [
        ("compress_all", lambda *_: (each for each in ()), "compress_all returned generator for 2 layers, but it must"),
        ("span", lambda *_: None, "span returned NoneType, but it must be a Span"),
        ("span", lambda *_: TOKENS, "span returned int, but it must be a Span"),
    ],
)
def test_what_is_no_list_or_no_span_is_named(method, made, said):
    wrong = type("Wrong", (type(policy("pool-time")),), {"name": "wrong", method: made})
    with pytest.raises(PolicyError, match=f"^Wrong.{said}"):
        run_session(Session(registry().stack("packforcing", {"compressor": wrong()}), TINY), 9)
    with pytest.raises(PolicyError, match="Wrong"):
        check_policy(wrong())


@pytest.mark.parametrize("name", KEEPING)
def test_videos_are_finite(name):
    pipe = quiet(tiny_wan_pipeline())
    pipe.enable_packforcing(compressor=name, keep_tokens=3, topk=2, sink_frames=4)
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 2.0, "max_sequence_length": 8}
    frames = pipe("a red circle", num_frames=93, output_type="latent", **call).frames
    assert frames.shape[2] == 24
    assert bool(frames.isfinite().all())
