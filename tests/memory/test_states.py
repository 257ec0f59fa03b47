"""The wide role: states, token sets and places, against stacks that say the same and against sums by hand."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from helpers import attention, context, quiet, state
from kvpack.errors import PolicyError
from kvpack.memory import Attended, StateMemory, Tokens, consecutive
from kvpack.memory.attended import biased
from kvpack.memory.geometry import Geometry
from kvpack.memory.session import Session
from kvpack.planning.planner import plan
from kvpack.policies import DeepForcing, MemRoPE, RollingSink, self_forcing
from kvpack.testing import TINY, run_session, tiny_wan_pipeline

FRAME = TINY.tokens_per_frame


@dataclass(frozen=True)
class Window(StateMemory):
    """A rolling window with a sink, as a state."""

    window_frames: int = 9
    sink_frames: int = 3
    chunk_frames: int = 3
    name = "test-window"
    commit = "rerun"

    def attend(self, state, chunk):
        held = chunk.tokens[:0] if state is None else state
        sink, over = self.sink_frames * FRAME, len(held) + len(chunk.tokens) - self.window_frames * FRAME
        held = held[:sink] + held[sink + max(0, over) :]
        return Attended((held,), chunk.first_frame, held)

    def remember(self, state, chunk):
        return state + chunk.tokens


def tokens(count, first=0, rows=1, value=None):
    keys = torch.arange(first, first + count).float().reshape(1, -1, 1, 1).expand(rows, -1, 2, 6)
    places = torch.zeros(1, count, 3)
    places[0, :, 0] = torch.arange(first, first + count)
    return Tokens(keys, keys if value is None else torch.full_like(keys, value), places)


def test_a_state_says_what_a_stack_says():
    stack = run_session(Session(self_forcing(window_frames=9, sink_frames=3), TINY), 8, batch=2)
    wide = run_session(Session(Window(), TINY), 8, batch=2)
    assert all(torch.equal(a, b) for a, b in zip(stack, wide, strict=True))


def test_a_chunk_can_be_done_again_and_a_session_forked():
    session = Session(Window(), TINY)
    run_session(session, 3)
    fork = session.snapshot()
    first, second = (run_session(each, 2, seed=7) for each in (session, fork))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert session.stats()["chunks"] == fork.stats()["chunks"] == 5


def test_a_chunk_that_is_given_up_after_a_veto_begins_from_the_past():
    @dataclass(frozen=True)
    class Vetoes(Window):
        max_retries = 1

        def veto(self, state, latents):
            return torch.tensor([True]), state[:FRAME]

    session = Session(Vetoes(), TINY)
    run_session(session, 2)
    session.denoise(0)
    assert session.review(torch.zeros(1, 16, 3, 2, 2)) is not None
    session.adopt(session.past)
    assert all(layer.forward.states is session.past.states for layer in session.denoise(0))


def test_tokens_are_cut_joined_and_taken():
    both = tokens(3) + tokens(2, first=10)
    assert both.coordinates[0, :, 0].tolist() == [0, 1, 2, 10, 11]
    assert both[1:4].keys[0, :, 0, 0].tolist() == [1, 2, 10]
    some = both.take(torch.tensor([[4, 0]]))
    assert some.keys[0, :, 0, 0].tolist() == some.coordinates[0, :, 0].tolist() == [11, 0]
    heads = both.take(torch.tensor([[[0, 1], [3, 4]]]))  # one token of each head's own, twice
    assert heads.keys[0, :, :, 0].tolist() == heads.coordinates[0, :, :, 0].tolist() == [[0, 1], [10, 11]]
    assert (heads + both).coordinates.shape == (1, 7, 2, 3)
    biased = replace(both, bias=-1.5)
    made = (biased[1:4], biased + biased, biased.take(torch.tensor([[0]])), biased[1:4].compact())
    assert [each.bias for each in made] == [-1.5] * 4
    compact = made[-1]
    parts = compact.keys, compact.values, compact.coordinates
    assert [each.untyped_storage().nbytes() for each in parts] == [each.nbytes for each in parts]


def test_parts_are_placed_one_behind_the_other():
    parts = [tokens(2, first=4), tokens(0), tokens(1, first=30)]
    placed, stop = consecutive(parts, start=1.0)
    again, counted = consecutive(parts, start=1.0, frame_tokens=len(tokens(1)))
    assert counted == stop
    assert all(torch.equal(a.coordinates, b.coordinates) for a, b in zip(placed, again, strict=True))
    assert [each.coordinates[0, :, 0].tolist() for each in placed] == [[1, 2], [3]]
    assert stop == 4.0
    backwards = tokens(2, first=4).take(torch.tensor([[1, 0]])).starting_at(1.0)
    assert backwards.coordinates[0, :, 0].tolist() == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_is_two_attentions_merged(dtype):
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 12, generator=source, dtype=dtype) for n in (4, 9, 9))
    given = biased(q, k, v, torch.tensor([-1.5] * 5), attention)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 12**0.5
    parts = [slice(0, 5), slice(5, 9)]
    lse = [logits[..., part].logsumexp(-1) + (-1.5 if part.start == 0 else 0.0) for part in parts]
    outs = [torch.einsum("bhqk,bkhd->bqhd", logits[..., part].softmax(-1), v[:, part]) for part in parts]
    shares = torch.stack(lse).softmax(0).permute(0, 1, 3, 2)[..., None]
    torch.testing.assert_close(given, (shares * torch.stack(outs)).sum(0), rtol=1e-5, atol=1e-6)


def test_each_part_has_a_bias_of_its_own():
    @dataclass(frozen=True)
    class Frames(Window):
        bias: float | None = None

        def attend(self, state, chunk):
            held = chunk.tokens[:0] if state is None else state
            first, rest = held[:FRAME], held[FRAME:]
            parts = (first,) if self.bias is None else (first, replace(rest, bias=self.bias))
            return Attended(parts, chunk.first_frame, held)

    alone, biased = (run_session(Session(Frames(bias=bias), TINY), 3)[-1] for bias in (None, -1e4))
    torch.testing.assert_close(biased, alone)


@dataclass(frozen=True)
class ByRow(Window):
    """A window of which each row attends a copy with a bias of its own, or with NaN."""

    biases: tuple[float, ...] = (0.0, -2.0)
    spoilt: int | None = None

    def attend(self, state, chunk):
        attended = super().attend(state, chunk)
        ((held,), rows) = attended.tokens, []
        for row, bias in enumerate(self.biases):
            keys, values = held.keys[row : row + 1], held.values[row : row + 1]
            rows.append((Tokens(keys, values * (torch.nan if row == self.spoilt else 1), held.coordinates, bias),))
        return replace(attended, tokens=rows)


def test_each_row_has_a_bias_of_its_own():
    both = run_session(Session(ByRow(), TINY), 4, batch=2)[-1]
    none, all_of_it = (run_session(Session(ByRow(biases=(bias,) * 2), TINY), 4, batch=2)[-1] for bias in (0.0, -2.0))
    assert torch.equal(both[0], none[0])
    assert torch.equal(both[1], all_of_it[1])
    assert not torch.equal(both[1], none[1])


def test_what_one_row_attends_is_checked_too():
    with pytest.raises(PolicyError, match="returned values for layer 0 that are not finite"):
        run_session(Session(ByRow(spoilt=1), TINY), 2, batch=2)


@pytest.mark.parametrize("memory", [Window(), DeepForcing(), self_forcing()], ids=lambda each: each.name)
def test_tensors_of_a_denoising_step_are_let_go_of(memory):
    session = Session(memory, TINY)

    def forward(layers):
        shape = 3, 1, memory.chunk_frames * FRAME, TINY.heads, TINY.head_dim
        for layer in layers:
            given = [each.clone() for each in torch.randn(shape)]
            yield from (StorageWeakRef(each.untyped_storage()) for each in given)
            layer.attend(*given, attention)

    for chunk in range(4):
        first, *_ = [list(forward(session.denoise(step))) for step in range(2)]
        keys = [first[index] for index in range(1, len(first), 3)]
        assert chunk == 0 or all(each.expired() for each in keys)  # an empty state may be a view of its first chunk
        list(forward(session.commit()))
        session.finish_commit()
        assert all(each.expired() for each in first)


def test_each_head_has_places_of_its_own():
    """Two heads that keep different tokens attend as two models of a head each."""

    @dataclass(frozen=True)
    class Heads(StateMemory):
        heads: tuple[int, ...] = (0, 1)
        chunk_frames: int = 1
        name = "test-heads"
        commit = "rerun"

        def attend(self, state, chunk):
            if state is None:
                return Attended((), chunk.first_frame, None)
            last = torch.tensor([[[0 if head == 0 else len(state) - 1 for head in self.heads]]])
            return Attended((state.take(last),), chunk.first_frame, state)

        def remember(self, state, chunk):
            return chunk.tokens if state is None else state + chunk.tokens

    both = run_session(Session(Heads(), TINY), 4)[-1]
    assert TINY.heads == 2
    for head in (0, 1):
        alone = run_session(Session(Heads((head, head)), TINY), 4)[-1]
        torch.testing.assert_close(both[:, :, head], alone[:, :, head])


def test_what_a_memory_returns_is_checked():
    @dataclass(frozen=True)
    class Wrong(Window):
        how: str = "type"

        def attend(self, state, chunk):
            attended = super().attend(state, chunk)
            if self.how == "type":
                return attended.tokens
            held = chunk.tokens
            bad = {
                "keys": replace(held, keys=held.keys.double()),
                "coordinates": replace(held, coordinates=held.coordinates[:, :-1]),
                "nan": replace(held, values=held.values * torch.nan),
            }
            return replace(attended, tokens=(bad[self.how],))

    for how, message in (
        ("type", r"Wrong\.attend returned tuple in layer 0, but it must be Attended"),
        ("keys", r"returned keys torch\.float64 .* in layer 0, but they must be torch\.float32"),
        ("coordinates", r"returned coordinates \(1, 59, 3\) in layer 0"),
        ("nan", r"returned values for layer 0 that are not finite"),
    ):
        session = Session(Wrong(how=how), TINY)
        with pytest.raises(PolicyError, match=message):
            run_session(session, 1)
        assert session.stats()["chunks"] == 0


def frames_of(part):
    return sorted(set(part.coordinates[..., 0].flatten().tolist()))


def test_deep_sink_moves_and_evicts():
    memory = DeepForcing(chunk_frames=1, window_frames=4, sink_frames=2, budget_frames=0, recent_frames=1)
    session = Session(memory, TINY)
    seen = []
    run_session(session, 7, inspect=lambda each: seen.append([frames_of(part) for part in context(each).tokens]))
    assert seen[3] == [[0, 1], [2]]  # the last chunk that fits
    assert seen[4] == [[0, 1], [3]]  # 5 frames in a window of 4: frame 2 goes, the sink moves to 4 - 4
    assert seen[6] == [[2, 3], [5]]  # and on to 6 - 4


def test_participative_compression_keeps_what_queries_attend_most():
    memory = DeepForcing(chunk_frames=1, window_frames=5, sink_frames=1, budget_frames=4, recent_frames=2)
    session = Session(memory, TINY)
    run_session(session, 5)
    before = state(session, 1).tokens
    assert len(before) == 5 * FRAME
    seen = []
    run_session(session, 1, seed=3, inspect=lambda each: seen.append(context(each, 1).tokens[0].coordinates[0, 0, 0]))
    after = state(session, 1)
    kept = after.tokens
    assert len(kept) == 4 * FRAME  # one of the sink, one chosen token by token, two recent ones
    assert frames_of(kept[:FRAME]) == [0]
    assert frames_of(kept[-2 * FRAME :]) == [4, 5]
    assert set(frames_of(kept[FRAME : 2 * FRAME])) <= {1, 2, 3}
    assert after.chosen[0].tolist() == [0] * FRAME + [1] * FRAME + [0] * 2 * FRAME
    assert after.shift == 5 - 4
    assert seen == [1]


def test_memrope_averages_what_leaves():
    memory = MemRoPE(chunk_frames=1, sink_frames=1, recent_frames=2, slow=0.25, fast=0.5)
    session, outs, seen = Session(memory, TINY), [], []
    for chunk in range(6):
        run_session(session, 1, seed=chunk, inspect=lambda each: seen.append(context(each)))
        newest = state(session).recent[-FRAME:]
        outs.append(newest.keys.clone() if len(newest) else None)
    # Frame 0 is the sink; frames 1, 2 and 3 have left the two recent ones.
    means = state(session)
    one, two, three = outs[1], outs[2], outs[3]
    torch.testing.assert_close(means.slow.keys, 0.75 * (0.75 * one + 0.25 * two) + 0.25 * three)
    torch.testing.assert_close(means.fast.keys, 0.5 * (0.5 * one + 0.5 * two) + 0.5 * three)
    assert [frames_of(part) for part in seen[-1].tokens] == [[0], [1], [2], [3, 4]]
    assert seen[-1].chunk_start == 5
    assert means.slow.keys.dtype == torch.float32


def test_memrope_as_released_spreads_one_mean():
    session = Session(MemRoPE(chunk_frames=1, sink_frames=1, recent_frames=1, per_position=False), TINY)
    run_session(session, 4)
    keys = state(session).slow.keys
    assert torch.equal(keys, keys[:, :1].expand_as(keys))


def test_a_memory_is_planned_by_a_rehearsal():
    wan = Geometry(30, 12, 128, (30, 52), (44, 42, 42), dtype=torch.bfloat16)
    planned = plan(wan, MemRoPE(), 480)
    assert planned.attended_tokens == 12 * 1560  # sink 3, two averages, recent 4, chunk 3
    assert planned.attended_kv_bytes == 9 * 1560 * 184_320
    assert plan(wan, DeepForcing(), 60).attended_tokens <= 21 * 1560
    assert plan(TINY, Window(), 30).attended_tokens == plan(TINY, self_forcing(), 30).attended_tokens == 9 * FRAME


def test_a_memory_is_written_as_data_and_enabled():
    pipe = quiet(tiny_wan_pipeline())
    stock = [each.processor for each in (block.attn1 for block in pipe.transformer.blocks)]
    call = {"prompt": "a red circle", "height": 32, "width": 48, "num_frames": 45, "num_inference_steps": 2}
    call |= {"max_sequence_length": 8, "output_type": "latent"}
    data = DeepForcing(chunk_frames=2, window_frames=6, sink_frames=2, budget_frames=5, recent_frames=2).to_dict()
    videos = []
    for stack in (data, "deep-forcing", "memrope"):
        options = {} if stack is data else {"chunk_frames": 2}
        pipe.enable_packforcing(stack, **options)
        videos.append(pipe(**call, generator=torch.Generator().manual_seed(0)).frames)
        stats = pipe.packforcing.stats()
        assert stats["frames"] == 12
        assert stats["attended_tokens"] > 0
        pipe.disable_packforcing()
        assert [block.attn1.processor for block in pipe.transformer.blocks] == stock
    assert not torch.equal(videos[0], videos[1])
    assert not torch.equal(videos[1], videos[2])
    assert data["memory"] == "deep-forcing"


def test_a_rolling_sink_walks_to_and_fro():
    memory = RollingSink(chunk_frames=1, window_frames=4)
    session, seen, heard = Session(memory, TINY), [], []

    def look(session):
        parts = session.caches[1].attended.tokens
        keys = [each for part in parts for each in part.keys[0, FRAME - 1 :: FRAME]]
        seen.append([next(i for i, known in enumerate(heard) if torch.equal(known, each)) for each in keys])
        places = [frame for part in parts for frame in frames_of(part)]
        assert places == list(range(max(0, session.frames - 3), session.frames))  # true ones, whatever they hold
        heard.append(session.caches[1].captured.tokens.keys[0, -1].clone())

    for chunk in range(9):
        run_session(session, 1, seed=chunk, inspect=look)
    # Frame f >= 3 is replaced when frame f + 1 has come: by frames 2, 1, 0 (backward), then 0, 1, 2 (forward), ...
    after = [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [1, 2, 2, 4],
        [2, 2, 1, 5],
        [2, 1, 0, 6],
        [1, 0, 0, 7],
        [0, 0, 1, 8],
    ]
    assert seen == [[], *(each[-3:] for each in after[:-1])]  # what a chunk attends is what the one before left


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": [tokens(1)] * 2}, "returned a list of Tokens, Tokens in layer 0, but a list holds a tuple"),
        ({"tokens": [()]}, "returned a list of tuple in layer 0, but .* for each of 2 rows"),
        ({"tokens": [(), (None,)]}, "returned NoneType in layer 0, but it must be Tokens"),
        ({"chunk_start": torch.arange(7.0)}, r"returned chunk_start \(7,\) in layer 0, but it must be a number or"),
        ({"hidden": -1}, "returned hidden -1 in layer 0, but it must be an int from 0 to"),
        ({"hidden": "3"}, "returned hidden '3'"),
    ],
)
def test_what_is_attended_is_checked(wrong, message):
    @dataclass(frozen=True)
    class Wrong(Window):
        def attend(self, state, chunk):
            return replace(super().attend(state, chunk), **wrong)

    with pytest.raises(PolicyError, match=f"Wrong.attend {message}"):
        run_session(Session(Wrong(), TINY), 1, batch=2)


@pytest.mark.parametrize(
    ("vetoed", "message"),
    [
        (lambda: True, r"veto returned bool in layer 0, but rows are torch.bool \(1,\)"),
        (lambda: torch.zeros(1), r"veto returned torch.float32 \(1,\) in layer 0"),
        (lambda: torch.tensor(True), r"veto returned torch.bool \(\) in layer 0"),
        (
            iter([torch.tensor([False]), torch.tensor([True])]).__next__,
            "vetoes other rows in one layer",
        ),
    ],
)
def test_what_is_vetoed_is_checked(vetoed, message):
    @dataclass(frozen=True)
    class Vetoes(Window):
        max_retries = 1

        def veto(self, state, latents):
            return vetoed(), state

    session = Session(Vetoes(), replace(TINY, layers=2))
    run_session(session, 1)
    with pytest.raises(PolicyError, match=message):
        session.review(torch.zeros(1, 16, 3, 2, 2))
