"""Each selector on numbers that can be checked by hand, or against a plain double loop."""

from dataclasses import dataclass, replace
from math import cos, log, sqrt

import pytest
import torch

from kvpack.errors import InvalidOptionError
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.memory.roles import Candidates, Query
from kvpack.memory.rope import rotate, rotations
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
from kvpack.plugins.registry import registry
from kvpack.plugins.resolve import stack_from_dict
from kvpack.policies import (
    ContiguousReindexer,
    IdentityCompressor,
    PoolCompressor,
    QueryTopK,
    RandomSelector,
    SinkMidRecentPartitioner,
    SoftmaxMassSelector,
    UniformSelector,
    softmax_mass,
)
from kvpack.testing import TINY, check_policy, run_session


def count_of(count):
    return Candidates(tuple(range(count)), (1,) * count, torch.ones(count).long(), torch.zeros(1, count, 1, 2), None)


def query(rows=1, layer=0, chunk=0):
    return Query(torch.zeros(rows, 1, 1, 2), layer, chunk)


def blocks_of(keys):
    """Candidates of `[batch, blocks, tokens, heads, head_dim]` keys."""
    count = keys.shape[1]
    tokens = torch.full((count,), keys.shape[2])
    return Candidates(tuple(range(count)), (1,) * count, tokens, keys.sum(2), lambda block: keys[:, block])


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_kernel_gives_the_masses_that_products_give(rows, dtype):
    # The kernel for a CPU takes and gives what the one for CUDA does, which runs where that is.
    kernels = {"cpu": torch.ops.aten._scaled_dot_product_flash_attention_for_cpu}
    if torch.cuda.is_available():
        kernels["cuda"] = softmax_mass._fused_attention(torch.zeros(1, 1, 1, 16, device="cuda", dtype=torch.half))
    queries, keys = torch.randn(rows, 24, 3, 16), torch.randn(rows, 9, 7, 3, 16)
    for device, kernel in kernels.items():
        if (device, dtype) == ("cuda", torch.float32):
            continue  # flash attention is for half precision there
        some, few = queries.to(device, dtype)[:, ::2], keys.to(device, dtype)[:, ::2]
        masses = softmax_mass.attended(some, few, kernel)
        torch.testing.assert_close(masses, softmax_mass.products(some, few), atol=1e-4, rtol=1e-4)
    assert softmax_mass._fused_attention(queries) is None


def test_runs_of_an_archive_are_its_blocks_in_order():
    """Blocks are read several at once, where they lie, across the end of the ring of slots too."""
    stack = registry().stack("packforcing", {"keep_tokens": 5, "topk": 2, "archive_blocks": 5})
    seen = []

    class Spy(SoftmaxMassSelector):
        name = "spy"

        def scores(self, query, candidates):
            one = torch.cat([candidates.keys(block) for block in range(candidates.count)], dim=1)
            runs = list(candidates.together(3))
            assert [each.shape[1] for each in runs[:-1]] == [3] * (len(runs) - 1)
            seen.append(torch.equal(torch.cat([each.flatten(1, 2) for each in runs], dim=1), one))
            return super().scores(query, candidates)

    for store in ("dense", "int8"):
        codec = registry().policy("codec", store, {})
        run_session(Session(replace(stack, selector=Spy(2), store=codec), TINY), 16, batch=2)
    assert len(seen) == 40
    assert all(seen)


@pytest.mark.parametrize(
    "policy",
    [
        UniformSelector(1),
        RandomSelector(3, seed=7),
        SoftmaxMassSelector(2, max_queries=5),
        SoftmaxMassSelector(2, after_rope=True),
        QueryTopK(2, after_rope=True),
    ],
)
def test_options_keep_the_contract(policy):
    check_policy(policy)


@pytest.mark.parametrize(
    ("topk", "count", "picks"),
    [(4, 10, [0, 3, 6, 9]), (2, 9, [0, 8]), (3, 6, [0, 3, 5]), (5, 6, [0, 1, 3, 4, 5]), (1, 5, [2]), (0, 5, [])],
)
def test_uniform_goes_from_the_first_to_the_last(topk, count, picks):
    assert UniformSelector(topk).select(query(2), count_of(count)).tolist() == [picks, picks]


def test_uniform_never_picks_a_block_twice():
    for count in range(2, 40):
        for topk in range(1, count):
            picks = UniformSelector(topk).select(query(), count_of(count))[0].tolist()
            assert len(set(picks)) == topk == len(picks)
            assert 0 <= min(picks) <= max(picks) < count


def test_random_is_a_function_of_seed_chunk_and_layer():
    def picks(seed=0, layer=0, chunk=0):
        chosen = RandomSelector(8, seed).select(query(3, layer, chunk), count_of(40))
        assert chosen[0].tolist() == chosen[1].tolist() == chosen[2].tolist()
        assert len(set(chosen[0].tolist())) == 8
        return chosen[0].tolist()

    state = torch.random.get_rng_state()
    assert picks() == picks()
    assert len({tuple(each) for each in (picks(), picks(seed=1), picks(layer=1), picks(chunk=1))}) == 4
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {each for chunk in range(60) for each in picks(chunk=chunk)} == set(range(40))


def test_softmax_mass_is_the_logarithm_of_the_attention_that_a_block_takes():
    # q = 1 in one channel: products are the keys; log(1 + 2) < log(4), and log(e^3 + e^-3) > log(e + e).
    q = torch.ones(1, 1, 1, 1)
    keys = torch.tensor([[0.0, log(2.0)], [log(4.0), -1e4], [3.0, -3.0], [1.0, 1.0]]).reshape(1, 4, 2, 1, 1)
    scores = SoftmaxMassSelector().scores(Query(q, 0, 0), blocks_of(keys))
    torch.testing.assert_close(scores, torch.tensor([[log(3.0), log(4.0), 3.0 + log(1 + 2.71828183**-6), 1 + log(2)]]))
    assert SoftmaxMassSelector(1).select(Query(q, 0, 0), blocks_of(keys[:, 2:])).tolist() == [[0]]
    assert QueryTopK(1).select(Query(q, 0, 0), blocks_of(keys[:, 2:])).tolist() == [[1]]  # its mean is larger


def test_softmax_mass_is_a_mean_over_heads_and_every_third_query():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 9, 3, 8, generator=generator), torch.randn(2, 5, 7, 3, 8, generator=generator)
    given = SoftmaxMassSelector(max_queries=3).scores(Query(q, 0, 0), blocks_of(k))
    for b in range(2):
        for m in range(5):
            masses = [(k[b, m, :, h] @ q[b, i, h] / sqrt(8)).exp().sum().log() for i in (0, 3, 6) for h in range(3)]
            torch.testing.assert_close(given[b, m], torch.stack(masses).mean())


@dataclass(frozen=True)
class Spy(QueryTopK):
    """Keeps what it saw last."""

    name = "spy"

    def select(self, query, candidates):
        SEEN[:] = [query, candidates, self.scores(query, candidates)]
        return super().select(query, candidates)


SEEN: list = []


def test_after_rope_a_score_is_the_cosine_of_the_distance():
    """One token a frame whose queries and keys are 1 in the slowest time channel: q . k = cos(frames between them)."""
    line = Geometry(1, 1, 6, (1, 1), (2, 2, 2))
    partitioner = SinkMidRecentPartitioner(1, 0)
    stack = Stack("a", partitioner, IdentityCompressor(), Spy(2, after_rope=True), ContiguousReindexer(), 1)
    session = Session(stack, line)
    ones = torch.tensor([1.0, 0, 0, 0, 0, 0]).reshape(1, 1, 1, 6)
    for _ in range(7):
        session.denoise(0)
        session.layers[0].attend(ones, ones, ones, lambda q, k, v: q)
        session.commit()
        session.layers[0].attend(ones, ones, ones, lambda q, k, v: q)
        session.finish_commit()
    # The chunk at frame 6 with the blocks at frames 1 to 5.
    torch.testing.assert_close(SEEN[2], torch.tensor([[cos(6 - frame) / sqrt(6) for frame in range(1, 6)]]))
    assert session.stats()["selected"] == [[[0, 4]]]


def test_after_rope_is_the_exact_double_sum_at_absolute_positions():
    stack = Stack(
        "a", SinkMidRecentPartitioner(4, 4), PoolCompressor(), Spy(2, after_rope=True), ContiguousReindexer(), 4
    )
    run_session(Session(stack, TINY), 7, batch=2)
    given_query, candidates, scores = SEEN
    assert candidates.first_frames == (4, 8, 12, 16)
    turned = rotate(
        given_query.queries, rotations((grid_coordinates(4, TINY.grid) + torch.tensor([24.0, 0, 0]))[None], TINY)
    )
    for block, first in enumerate(candidates.first_frames):
        places = torch.tensor([[first + 0.5, 1.5, 2.0], [first + 2.5, 1.5, 2.0]])
        keys = rotate(candidates.keys(block), rotations(places[None], TINY))
        exact = torch.einsum("bihd,bjhd->b", turned, keys) / (80 * 2 * TINY.heads * sqrt(TINY.head_dim))
        torch.testing.assert_close(scores[:, block], exact, rtol=1e-4, atol=1e-6)
    before = QueryTopK().scores(given_query, candidates)
    assert not torch.allclose(before, scores)


def test_nothing_is_rotated_unless_asked():
    keys = torch.randn(1, 3, 2, 1, 2)
    assert QueryTopK(1).scores(query(), blocks_of(keys)).shape == (1, 3)
    with pytest.raises(TypeError, match="without positions"):
        QueryTopK(1, after_rope=True).scores(query(), blocks_of(keys))


def checked(policy, **options):
    """Past the signatures, which the tests check and a user's process doesn't."""
    vars(policy).update(options)
    policy.__post_init__()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformSelector(-1), "topk must be >= 0, got -1"),
        (lambda: RandomSelector(-1), "topk must be >= 0, got -1"),
        (lambda: RandomSelector(seed=-2), "seed must be >= 0, got -2"),
        (lambda: SoftmaxMassSelector(max_queries=0), "max_queries must be >= 1, got 0"),
        (lambda: checked(QueryTopK(), after_rope="yes"), "after_rope must be True or False, got 'yes'"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(InvalidOptionError, match=message):
        make()


@pytest.mark.parametrize("name", ["uniform", "random", "softmax-mass", "topk", "recency"])
def test_packforcing_hands_topk_to_a_selector_by_name(name):
    stack = registry().stack("packforcing", {"selector": name, "topk": 3})
    assert (stack.selector.name, stack.selector.topk) == (name, 3)
    assert stack_from_dict(stack.to_dict()) == stack
