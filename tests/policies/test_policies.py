"""Every installed policy keeps its contract, and each does what its paper says."""

import inspect
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch

from helpers import archived, pool_stack
from kvpack.errors import InvalidOptionError, PolicyError
from kvpack.memory.blocks import KVBlock, LatentChunk, Span, grid_coordinates
from kvpack.memory.roles import Candidates, Layout, Query
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
from kvpack.plugins.registry import registry
from kvpack.policies import (
    AbsoluteReindexer,
    ContiguousReindexer,
    FitReindexer,
    FullPartitioner,
    IdentityCompressor,
    LowResolutionCompressor,
    PackedReindexer,
    PoolCompressor,
    QueryTopK,
    RecencySelector,
    SinkMidRecentPartitioner,
    SinkShiftReindexer,
    WindowPartitioner,
)
from kvpack.testing import TINY, check_memory, check_policy, run_session

OPTIONS = {"fit": {"train_frames": 40}}


@pytest.mark.parametrize(("role", "name"), sorted(registry().policies))
@pytest.mark.parametrize("chunk_frames", [4, 3])
def test_every_installed_policy_keeps_the_contract(role, name, chunk_frames):
    check_policy(registry().policy(role, name, OPTIONS.get(name)), chunk_frames)


@pytest.mark.parametrize(("role", "name"), sorted(registry().policies))
def test_policies_are_frozen(role, name):
    policy = registry().policy(role, name, OPTIONS.get(name))
    with pytest.raises(FrozenInstanceError):
        policy.anything = 1


def candidates(key_sums, tokens=None):
    count = key_sums.shape[1]
    return Candidates(
        tuple(range(0, 4 * count, 4)), (4,) * count, tokens if tokens is not None else torch.ones(count), key_sums, None
    )


def test_topk_score_is_the_exact_double_sum():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 3, 8, generator=generator)
    k = torch.randn(2, 5, 7, 3, 8, generator=generator)  # (b, m, j, h, d)
    given = QueryTopK().scores(Query(q, 0, 0), candidates(k.sum(2), torch.full((5,), 7)))
    exact = torch.einsum("bihd,bmjhd->bm", q, k) / (9 * 7 * 3 * 8**0.5)
    torch.testing.assert_close(given, exact, rtol=1e-4, atol=1e-6)


def test_topk_chooses_per_sample_and_breaks_ties_to_the_later_block():
    q = torch.zeros(2, 1, 1, 2)
    q[0, ..., 0] = q[1, ..., 1] = 1.0
    sums = torch.zeros(2, 4, 1, 2)
    sums[:, 1, 0, 0] = sums[:, 2, 0, 1] = 1.0
    assert QueryTopK(1).select(Query(q, 0, 0), candidates(sums)).tolist() == [[1], [2]]
    assert QueryTopK(2).select(Query(q, 0, 0), candidates(torch.zeros(2, 4, 1, 2))).tolist() == [[3, 2], [3, 2]]


def test_topk_does_not_favour_big_blocks():
    q, sums = torch.ones(1, 1, 1, 2), torch.tensor([[[[4.0, 4.0]], [[2.0, 2.0]]]])
    chosen = QueryTopK(1).select(Query(q, 0, 0), candidates(sums, torch.tensor([8, 1])))
    assert chosen.tolist() == [[1]]


def test_topk_of_the_true_past_beats_recency():
    """A chunk that looks like an old block attends it."""
    session = Session(stack(selector=QueryTopK(1)), TINY)
    run_session(session, 10)
    wanted = 2
    queries = archived(session)[wanted][0].sum(dim=1).expand(80, -1, -1)[None] * 10
    layer, _ = session.denoise(0)
    layer.attend(queries, torch.zeros_like(queries), torch.zeros_like(queries), lambda q, k, v: q)
    assert session.stats()["selected"][0] == [[wanted]]


stack = pool_stack


def block(frames=4, grid=(8, 8)):
    tokens = frames * grid[0] * grid[1]
    keys, values = torch.randn(2, 1, tokens, 2, 6, generator=torch.Generator().manual_seed(1))
    return KVBlock(keys, values, Span(4, frames, grid_coordinates(frames, grid)))


def test_pool_averages_2x4x4_windows():
    whole = block()
    small = PoolCompressor().compress(whole, (8, 8))
    assert small.keys.shape == (1, 8, 2, 6)
    cells = whole.keys.unflatten(1, (4, 8, 8))
    torch.testing.assert_close(small.keys[:, 0], cells[:, :2, :4, :4].mean((1, 2, 3)))
    torch.testing.assert_close(small.keys[:, 7], cells[:, 2:, 4:, 4:].mean((1, 2, 3)))
    assert small.span.coordinates[7].tolist() == [2.5, 5.5, 5.5]


def test_pool_drops_no_row_of_an_odd_grid():
    whole = block(frames=3, grid=(7, 9))
    assert PoolCompressor().compress(whole, (7, 9)).keys.shape[1] == 2
    last_row = torch.zeros(3, 7, 9, 2, 6)
    last_row[:, -1] = 1.0
    marked = replace(whole, keys=last_row.reshape(1, -1, 2, 6))
    assert bool((PoolCompressor().compress(marked, (7, 9)).keys > 0).all())


def test_lr_shrinks_pixels_and_drops_no_frame():
    seen = {}

    def encode(pixels):
        seen["shape"], seen["mean"] = tuple(pixels.shape), float(pixels.mean())
        return torch.zeros(1, 16, 2, 14, 26)

    pixels = torch.zeros(1, 3, 16, 480, 832)
    pixels[:, :, -1] = 1.0  # the last frame must count
    embed = lambda latents: torch.zeros(1, 182, 6)  # noqa: E731
    chunk = LatentChunk(
        torch.zeros(1, 16, 4, 60, 104), 4, (30, 52), lambda: pixels, encode, embed, (16, 16), 6, torch.float32
    )
    assert LowResolutionCompressor().tokens(chunk).shape == (1, 182, 6)
    assert seen["shape"] == (1, 3, 5, 112, 208)
    assert seen["mean"] > 0


def layout(parts, frames, first, chunk_first=100):
    values = [torch.tensor([each], dtype=torch.float64) for each in (first, frames)]
    return Layout(tuple(parts), values[0], values[1], values[1], chunk_first, 4)


PARTS, FRAMES, FIRST = ["sink", "sink", "mid", "mid", "recent"], [4, 4, 4, 4, 4], [0, 4, 40, 60, 96]


@pytest.mark.parametrize(
    ("reindexer", "starts", "lengths", "chunk"),
    [
        (ContiguousReindexer(), [0, 4, 8, 12, 16], [4, 4, 4, 4, 4], 20),
        (AbsoluteReindexer(), [0, 4, 40, 60, 96], [4, 4, 4, 4, 4], 100),
        (SinkShiftReindexer(), [32, 36, 40, 60, 96], [4, 4, 4, 4, 4], 100),
        (FitReindexer(20), [0, 4, 8, 10, 12], [4, 4, 2, 2, 4], 16),
        (PackedReindexer(2), [0, 4, 8, 10, 12], [4, 4, 2, 2, 4], 16),
        (FitReindexer(40), [0, 4, 8, 12, 16], [4, 4, 4, 4, 4], 20),
    ],
)
def test_reindexers(reindexer, starts, lengths, chunk):
    placement = reindexer.place(layout(PARTS, FRAMES, FIRST))
    assert placement.starts[0].tolist() == starts
    assert placement.lengths[0].tolist() == lengths
    assert placement.chunk_start.tolist() == [chunk]


def test_fit_without_mid_squeezes_all_history():
    placement = FitReindexer(20).place(layout(["recent"] * 8, [4] * 8, range(0, 32, 4)))
    assert placement.lengths[0].tolist() == [2.0] * 8
    assert placement.chunk_start.tolist() == [16.0]


@pytest.mark.parametrize(
    "reindexer",
    [ContiguousReindexer(), AbsoluteReindexer(), SinkShiftReindexer(), FitReindexer(20), PackedReindexer()],
)
def test_a_first_chunk_has_no_history(reindexer):
    placement = reindexer.place(layout([], [], [], chunk_first=0))
    assert placement.chunk_start.tolist() == [0.0]
    assert placement.starts.shape == (1, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QueryTopK(-1), "topk must be >= 0, got -1"),
        (lambda: RecencySelector(-2), "topk must be >= 0, got -2"),
        (lambda: SinkMidRecentPartitioner(-1, 4), "sink_frames must be >= 0, got -1"),
        (lambda: WindowPartitioner(0), "window_frames must be >= 1, got 0"),
        (lambda: FitReindexer(True), "train_frames must be a whole number"),
        (lambda: stack(partitioner=SinkMidRecentPartitioner(1, 2)), r"must be at least chunk_frames 4, got 1 \+ 2"),
        (lambda: stack(partitioner=WindowPartitioner(6, 4)), "window_frames must be at least 8"),
        (lambda: stack(reindexer=FitReindexer(16)), "train_frames > 16"),
        (lambda: stack(selector=PoolCompressor()), "selector must be a Selector, got PoolCompressor"),
        (lambda: replace(stack(), chunk_frames=0), "chunk_frames must be >= 1, got 0"),
        (lambda: replace(stack(), archive_blocks=-1), "archive_blocks must be >= 0, got -1"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(InvalidOptionError, match=message):
        make()


@dataclass(frozen=True)
class Wrong(QueryTopK):
    """Returns whatever it is told to."""

    result: str = "index"
    name = "wrong"

    def select(self, query, candidates):
        good = super().select(query, candidates)
        return {
            "index": good + 7,
            "negative": good - 9,
            "twice": good.clamp(max=0),
            "shape": good[:, :1],
            "dtype": good.float(),
            "type": good.tolist(),
        }[self.result]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("index", r"returned index \d+, but layer 0 has 3 candidates"),
        ("negative", r"returned index -\d+, but layer 0 has 3 candidates"),
        ("twice", "an index twice in layer 0"),
        ("shape", r"returned shape \(1, 1\) in layer 0, but it must be \(1, 2\)"),
        ("dtype", "torch.float32 in layer 0, but indices are int64"),
        ("type", "returned list"),
    ],
)
def test_a_wrong_choice_names_policy_and_layer_and_loses_nothing(result, message):
    session = Session(stack(selector=Wrong(2, result)), TINY)
    run_session(session, 5)
    session = Session(replace(session.stack), TINY)
    run_session(session, 5)
    before = session.frames
    with pytest.raises(PolicyError, match=message) as caught:
        run_session(session, 3)
    assert "Wrong.select" in str(caught.value)
    assert session.frames in (before, before + 4)


class BadPool(PoolCompressor):
    def compress(self, block, grid):
        small = super().compress(block, grid)
        return replace(small, keys=small.keys[:, :1])


class DoublePool(PoolCompressor):
    def compress(self, block, grid):
        small = super().compress(block, grid)
        return replace(small, values=small.values.double())


@dataclass(frozen=True)
class Nowhere(ContiguousReindexer):
    what: str = "chunk_start"

    def place(self, layout):
        placement = super().place(layout)
        return replace(placement, **{self.what: getattr(placement, self.what) * float("nan")})


class Misshapen(ContiguousReindexer):
    def place(self, layout):
        placement = super().place(layout)
        return replace(placement, starts=placement.starts[:, 1:])


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"compressor": BadPool()}, r"BadPool.compress returned keys \(1, 1, 2, 12\) in layer 0"),
        ({"compressor": DoublePool()}, "DoublePool.compress returned values torch.float64 in layer 0"),
        *(
            ({"reindexer": Nowhere(what)}, "Nowhere.place returned positions for layer 0 that are not finite")
            for what in ("chunk_start", "starts", "lengths")
        ),
        ({"reindexer": Misshapen()}, "Misshapen.place returned starts"),
    ],
)
def test_a_wrong_block_or_placement_is_named(roles, message):
    session = Session(stack(**roles), TINY)
    with pytest.raises(PolicyError, match=message):
        run_session(session, 8)
    assert session.frames % 4 == 0


def test_a_wrong_placement_of_one_row_is_named():
    class RowByRow(QueryTopK):
        def select(self, query, candidates):
            return torch.arange(query.queries.shape[0])[:, None]

    class NotAtEight(ContiguousReindexer):
        def place(self, layout):
            mid = torch.tensor([part == "mid" for part in layout.parts], dtype=torch.bool)
            placement, wrong = super().place(layout), (mid & (layout.first_frames == 8)).any(dim=1)
            return replace(placement, chunk_start=placement.chunk_start.masked_fill(wrong, float("nan")))

    session = Session(pool_stack(SinkMidRecentPartitioner(6, 4), selector=RowByRow(1), reindexer=NotAtEight()), TINY)
    with pytest.raises(PolicyError, match=r"NotAtEight\.place returned positions for layer 0 that are not finite"):
        run_session(session, 8, batch=2)


def test_check_policy_finds_what_is_wrong():
    class Mutable(QueryTopK):
        def select(self, query, candidates):
            object.__setattr__(self, "topk", self.topk + 1)
            return super().select(query, candidates)[:, :2]

        def limit(self, candidates):
            return min(2, candidates)

    class Couples(QueryTopK):
        def scores(self, query, candidates):
            return super().scores(query, candidates).mean(0, keepdim=True).expand(query.queries.shape[0], -1)

    class Random(QueryTopK):
        def scores(self, query, candidates):
            return torch.rand_like(super().scores(query, candidates))

    class Fickle(QueryTopK):
        def scores(self, query, candidates):
            source = torch.Generator()
            source.seed()
            return torch.rand(super().scores(query, candidates).shape, generator=source)

    for policy, message in (
        (Mutable(2), "changed its own fields"),
        (Couples(1), "influence each other"),
        (Random(1), "draws from torch's global generator"),
        (Fickle(1), "not deterministic"),
    ):
        with pytest.raises(PolicyError, match=message):
            check_policy(policy)


@dataclass(frozen=True)
class Parts(SinkMidRecentPartitioner):
    """One that says another horizon, or brings frames back."""

    horizon: int = 4
    back: bool = False

    @property
    def horizon_frames(self):
        return self.horizon

    def partition(self, history_frames, chunk_frames):
        parts = super().partition(history_frames, chunk_frames)
        return tuple(each for each in parts if each.part != "mid" or not self.back or history_frames > 40)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (
            Parts(4, 12, horizon=4),
            r"frame 4 in recent of 16 frames and in mid of 20, .* horizon_frames = 4",
        ),
        (Parts(4, 4, horizon=-5), r"horizon_frames is -5, but it must be a whole number of frames >= 0"),
        (Parts(4, 4, horizon=8, back=True), r"frame 4 in no part of 40 frames and in mid of 44"),
    ],
)
def test_a_horizon_is_held_to_the_parts(policy, said):
    with pytest.raises(PolicyError, match=said):
        check_policy(policy)
    check_policy(Parts(policy.sink_frames, 4, horizon=8))


def test_a_partitioner_that_gives_no_segments_is_named():
    class Nothing(SinkMidRecentPartitioner):
        def partition(self, history_frames, chunk_frames):
            return None

    class Lost(SinkMidRecentPartitioner):
        def partition(self, history_frames, chunk_frames):
            return {}["lost"]

    for policy, said in (
        (Nothing(8, 4), "Nothing.partition returned None; it must be a tuple of Segments"),
        (Lost(8, 4), r"Lost fails in torch.float32: KeyError: 'lost'"),
    ):
        with pytest.raises(PolicyError, match=said):
            check_policy(policy)


def unchecked(function):
    """The function as users have it, without the tests' checks of its types."""
    return inspect.unwrap(function)


def test_the_checks_say_which_of_them_is_right():
    with pytest.raises(InvalidOptionError, match=r"but QueryTopK is a selector; call check_policy\(QueryTopK\(...\)\)"):
        unchecked(check_memory)(QueryTopK(2))
    for check in map(unchecked, (check_memory, check_policy)):
        with pytest.raises(InvalidOptionError, match=r"tests an instance, got the class QueryTopK; give QueryTopK\(\)"):
            check(QueryTopK)
        with pytest.raises(InvalidOptionError, match="got 'topk'"):
            check("topk")


def test_nothing_of_the_mid_is_attended_with_topk_zero():
    session = Session(stack(selector=QueryTopK(0)), TINY)
    run_session(session, 9)
    assert session.stats()["attended_tokens"] == 12 * TINY.tokens_per_frame
    assert session.stats()["archive_blocks"] == 6


def test_full_with_identity_mid_equals_full_history():
    """Two ways to say "everything": no partition at all, or an uncompressed mid of which all is attended."""
    everything = Stack(
        "a", FullPartitioner(), IdentityCompressor(), registry().policy("selector", "all"), ContiguousReindexer()
    )
    mid = replace(everything, partitioner=SinkMidRecentPartitioner(4, 4))
    for a, b in zip(run_session(Session(everything, TINY), 7), run_session(Session(mid, TINY), 7), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
