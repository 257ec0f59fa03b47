"""Memories that choose token by token or step by step, against loops in plain Python and numbers by hand."""

import cmath
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import context, state
from kvpack.errors import InvalidOptionError
from kvpack.memory import Chunk, Tokens
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.memory.session import Session
from kvpack.plugins.registry import registry
from kvpack.policies import FlowCache, HeavyHitters, Magi
from kvpack.testing import TINY, check_memory, run_session

SMALL = Geometry(layers=1, heads=2, head_dim=12, grid=(1, 7), rope_split=(4, 4, 4))
FRAME = SMALL.tokens_per_frame


def make(index, step, keys, queries, frames=1):
    places = grid_coordinates(frames, SMALL.grid).double().clone()
    places[:, 0] += index * frames
    ids = (places[:, 0] * FRAME + places[:, 2])[None, :, None, None].expand(keys.shape)  # values tell which token it is
    tokens = Tokens(keys, ids.to(keys.dtype), places[None])
    return Chunk(queries, tokens, 0, index, index * frames, frames, step, SMALL)


def drive(memory, keys, queries):
    """Attended tokens, first at a noisy forward, and the state after each chunk; keys and queries by chunk."""
    state, attended, states = None, [], []
    for index, (k, q) in enumerate(zip(keys, queries, strict=True)):
        given = memory.attend(state, make(index, 0, k, q, memory.chunk_frames))
        assert given.chunk_start == index * memory.chunk_frames
        state = memory.remember(given.state, make(index, -1, k, q, memory.chunk_frames))
        attended.append(given.tokens[0])
        states.append(state)
    return attended, states


def random(chunks, frames=1, rows=2, seed=0, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    shape = (2, chunks, rows, frames * FRAME, SMALL.heads, SMALL.head_dim)
    return (torch.randn(shape, generator=source) * 2).to(dtype)


def ids(tokens, row, head):
    """Tokens that a head holds, by place in the video; values, keys and places must be of the same token."""
    where = tokens.coordinates.expand(tokens.keys.shape[0], *tokens.coordinates.shape[1:])[row]
    where = where if where.ndim == 2 else where[:, head]
    places = [round(t * FRAME + x) for t, _, x in where.tolist()]
    assert places == [round(value) for value in tokens.values[row, :, head, 0].tolist()]
    return places


def turned(vector, token):
    """RoPE by definition."""
    out = []
    for axis, position in enumerate((token // FRAME, 0, token % FRAME)):
        for pair in range(2):
            at = 4 * axis + 2 * pair
            z = complex(vector[at], vector[at + 1]) * cmath.exp(1j * position * 10000 ** (-pair / 2))
            out += [z.real, z.imag]
    return out


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits):
    weights = [math.exp(each - max(logits)) for each in logits]
    return [each / sum(weights) for each in weights]


def mean_attention(queries, keys):
    rows = [softmax([dot(q, k) / 12**0.5 for k in keys]) for q in queries]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def best(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def rotated(chunks, index, row, head):
    each = chunks[index][row, :, head].tolist()
    return {index * len(each) + i: turned(vector, index * len(each) + i) for i, vector in enumerate(each)}


def naive_flowcache(keys, queries, row, head, budget, mix):
    """What a head attends at each chunk."""
    held, known, seen = [], {}, []
    for index in range(len(keys)):
        if len(held) > budget:
            vectors = [known[token] for token in held]
            attended = mean_attention(rotated(queries, index, row, head).values(), vectors)
            pooled = [max(attended[max(0, i - 3) : i + 4]) for i in range(len(held))]
            cosines = [
                sum(dot(a, b) / (math.hypot(*a) * math.hypot(*b)) for b in vectors if b is not a) / (len(held) - 1)
                for a in vectors
            ]
            scores = [mix * a - (1 - mix) * r for a, r in zip(pooled, softmax(cosines), strict=True)]
            held = [held[i] for i in best(scores, budget)]
        seen.append(held)
        new = rotated(keys, index, row, head)
        known, held = known | new, held + list(new)
    return seen


def naive_h2o(keys, queries, row, head, budget, recent):
    """What a head holds after each chunk, and the masses."""
    held, known, masses, seen = [], {}, {}, []
    for index in range(len(keys)):
        new = rotated(keys, index, row, head)
        known, held = known | new, held + list(new)
        shares = mean_attention(rotated(queries, index, row, head).values(), [known[token] for token in held])
        for token, share in zip(held, shares, strict=True):
            masses[token] = masses.get(token, 0.0) + share
        if len(held) > budget:
            old = held[:-recent]
            held = [old[i] for i in best([masses[token] for token in old], budget - recent)] + held[-recent:]
        seen.append((held, [masses[token] for token in held]))
    return seen


@pytest.mark.parametrize(("mix", "frames"), [(0.07, 1), (0.07, 2), (0.9, 1), (0.0, 1)])
def test_flowcache_holds_what_a_plain_loop_holds(mix, frames):
    keys, queries = random(6, frames)
    memory = FlowCache(chunk_frames=frames, budget_frames=2, mix=mix)
    attended, _ = drive(memory, keys, queries)
    for row in (0, 1):
        for head in (0, 1):
            seen = naive_flowcache(keys, queries, row, head, 2 * FRAME, mix)
            assert [ids(tokens, row, head) for tokens in attended] == seen
    assert [len(tokens) // FRAME for tokens in attended] == [min(2, frames * i) for i in range(6)]
    assert ids(attended[-1], 0, 0) != ids(attended[-1], 0, 1) != ids(attended[-1], 1, 1)


def test_flowcache_drops_what_is_alike_in_each_head():
    """Of three frames one has keys unlike the others, another one in each head; it is kept."""
    along = torch.zeros(3, 1, FRAME, 2, 12)
    along[..., 2] = 1.0  # a slow channel, so that RoPE leaves all but the sign alone
    along[1, :, :, 0], along[2, :, :, 1] = -along[1, :, :, 0], -along[2, :, :, 1]
    memory = FlowCache(chunk_frames=3, budget_frames=1)
    together = along.transpose(0, 1).flatten(1, 2)
    (_, last), _ = drive(memory, [together, together], [torch.zeros_like(together)] * 2)
    assert ids(last, 0, 0) == list(range(FRAME, 2 * FRAME))
    assert ids(last, 0, 1) == list(range(2 * FRAME, 3 * FRAME))


def test_flowcache_keeps_neighbours_of_what_is_attended():
    """One key of two frames matches the queries; by attention alone it stays, with three on each side."""
    keys = torch.zeros(1, 2 * FRAME, 2, 12)
    keys[0, 9, 0, 2] = keys[0, 5, 1, 2] = 9.0
    queries = torch.zeros_like(keys)
    queries[..., 2] = 9.0
    (_, last), _ = drive(FlowCache(chunk_frames=2, budget_frames=1, mix=1.0), [keys, keys], [queries, queries])
    assert ids(last, 0, 0) == [6, 7, 8, 9, 10, 11, 12]
    assert ids(last, 0, 1) == [2, 3, 4, 5, 6, 7, 8]


def test_flowcache_forgets_the_newest_chunk():
    keys, queries = random(5)
    memory = FlowCache(chunk_frames=1, budget_frames=2)
    attended, states = drive(memory, keys, queries)
    assert len(states[4]) == 3 * FRAME
    left = memory.forget(states[4], FRAME)
    assert [ids(left, 1, head) for head in (0, 1)] == [ids(attended[4], 1, head) for head in (0, 1)]
    assert len(states[4]) == 3 * FRAME
    assert memory.replay_frames == 1


@pytest.mark.parametrize("frames", [1, 2])
def test_h2o_holds_what_a_plain_loop_holds(frames):
    keys, queries = random(6, frames)
    memory = HeavyHitters(chunk_frames=frames, budget_frames=3, recent_frames=1)
    attended, states = drive(memory, keys, queries)
    for row in (0, 1):
        for head in (0, 1):
            seen = naive_h2o(keys, queries, row, head, 3 * FRAME, FRAME)
            assert [ids(state.tokens, row, head) for state in states] == [held for held, _ in seen]
            assert [ids(tokens, row, head) for tokens in attended[1:]] == [held for held, _ in seen[:-1]]
            masses = torch.tensor(seen[-1][1])
            torch.testing.assert_close(states[-1].masses[row, :, head], masses, rtol=1e-4, atol=1e-6)
    assert len(attended[0]) == 0
    assert ids(states[-1].tokens, 0, 0) != ids(states[-1].tokens, 0, 1) != ids(states[-1].tokens, 1, 1)


def test_h2o_adds_up_attention_as_by_hand():
    """Queries of zero attend all alike: 1/1, 1/2, 1/3 and 1/4 of a mass to each frame, so that the oldest have most."""
    keys = torch.ones(5, 1, FRAME, 2, 12)
    _, states = drive(HeavyHitters(chunk_frames=1, budget_frames=3, recent_frames=1), keys, torch.zeros_like(keys))
    held = [sorted({token // FRAME for token in ids(state.tokens, 0, 0)}) for state in states]
    assert held == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 4]]
    masses = [1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4 + 1 / 4, 1 / 4]
    wanted = torch.tensor(masses).repeat_interleave(FRAME) / FRAME
    torch.testing.assert_close(states[-1].masses[0, :, 1], wanted)


def test_h2o_heads_keep_what_they_attend():
    """Each head's queries match one token of its own in frame 1, which stays though older ones had more time."""
    keys = torch.zeros(4, 1, FRAME, 2, 12)
    keys[1, 0, 3, 0, 2] = keys[1, 0, 5, 1, 2] = 6.0
    queries = torch.zeros_like(keys)
    queries[1:, ..., 2] = 6.0
    _, states = drive(HeavyHitters(chunk_frames=1, budget_frames=2, recent_frames=1), keys, queries)
    assert FRAME + 3 in ids(states[-1].tokens, 0, 0)
    assert FRAME + 3 not in ids(states[-1].tokens, 0, 1)
    assert FRAME + 5 in ids(states[-1].tokens, 0, 1)
    assert FRAME + 5 not in ids(states[-1].tokens, 0, 0)


def test_h2o_counts_some_queries_spread_evenly():
    """With at most two queries of seven, the first and the fifth count."""
    keys, queries = random(1)
    other = queries.clone()
    other[:, :, [1, 2, 3, 5, 6]] = 0
    memory = HeavyHitters(chunk_frames=1, max_queries=2)
    some, same = (drive(memory, keys, each)[1][0].masses for each in (queries, other))
    torch.testing.assert_close(some, same)
    assert not torch.allclose(some, drive(HeavyHitters(chunk_frames=1), keys, queries)[1][0].masses)


def test_h2o_forgets_the_newest_tokens():
    keys, queries = random(5)
    memory = HeavyHitters(chunk_frames=1, budget_frames=3, recent_frames=2)
    _, states = drive(memory, keys, queries)
    left = memory.forget(states[4], 2 * FRAME)
    assert ids(left.tokens, 0, 1) == ids(states[4].tokens, 0, 1)[:FRAME]
    assert torch.equal(left.masses, states[4].masses[:, :FRAME])
    assert len(states[4].tokens) == 3 * FRAME
    assert HeavyHitters(chunk_frames=3, recent_frames=8).replay_frames == 6


def test_magi_attends_less_the_cleaner_the_chunk():
    memory = Magi(chunk_frames=2, previous_chunks=(3, 2, 1), clean_chunks=0)
    session = Session(memory, TINY)

    def attended():
        (tokens,) = context(session, 1).tokens
        assert context(session, 1).chunk_start == session.frames
        frames = sorted(set(tokens.coordinates[..., 0].flatten().tolist()))
        assert len(tokens) == len(frames) * TINY.tokens_per_frame
        return frames

    seen = {}
    for chunk in range(5):
        for step in (0, 1, 2, 3, -1):
            session.commit() if step < 0 else session.denoise(step)
            for layer in session.layers:
                qkv = torch.ones(3, 1, 2 * TINY.tokens_per_frame, TINY.heads, TINY.head_dim)
                layer.attend(*qkv, lambda queries, keys, values: queries)
            seen[chunk, step] = attended()
        session.finish_commit()
    assert [seen[0, step] for step in (0, 3, -1)] == [[], [], []]
    assert seen[1, 0] == seen[1, 3] == [0, 1]
    assert [seen[2, step] for step in (0, 1, 2, 3)] == [[0, 1, 2, 3], [0, 1, 2, 3], [2, 3], [2, 3]]
    assert [seen[4, step] for step in (0, 1, 2, 3, -1)] == [
        [2, 3, 4, 5, 6, 7],
        [4, 5, 6, 7],
        [6, 7],
        [6, 7],
        [],
    ]
    assert len(state(session)) == 3 * 2 * TINY.tokens_per_frame  # no more is held than is ever attended


def test_magi_forgets_the_newest_chunks():
    keys, queries = random(6)
    memory = Magi(chunk_frames=1, previous_chunks=(1,), clean_chunks=3)
    _, states = drive(memory, keys, queries)
    assert ids(states[5], 0, 0) == list(range(3 * FRAME, 6 * FRAME))
    assert ids(memory.forget(states[5], 2 * FRAME), 1, 1) == list(range(3 * FRAME, 4 * FRAME))
    assert len(memory.forget(states[5], memory.replay_frames * FRAME)) == 0


def test_magi_goes_through_json():
    memory = Magi(previous_chunks=(4, 1), clean_chunks=0)
    data = json.loads(json.dumps(memory.to_dict()))
    again = registry().stack(data.pop("memory"), data)
    assert again == memory
    check_memory(again)


@settings(max_examples=25, deadline=None)
@given(
    frames=st.integers(1, 3),
    budget=st.integers(1, 5),
    recent=st.integers(1, 5),
    queries=st.integers(1, 30),
    which=st.sampled_from(["flowcache", "h2o"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_each_head_holds_a_token_at_most_once_in_order_within_its_budget(
    frames, budget, recent, queries, which, dtype, seed
):
    options = {"chunk_frames": frames, "budget_frames": budget, "max_queries": queries}
    if which == "h2o":
        options["recent_frames"] = recent = min(recent, budget)
    memory, chunks = registry().stack(which, options), random(5, frames, seed=seed, dtype=dtype)
    attended, _ = drive(memory, *chunks)
    alone, _ = drive(memory, *chunks[:, :, 1:])
    for index, tokens in enumerate(attended):
        assert tokens.keys.dtype == tokens.values.dtype == dtype
        assert len(tokens) == min(index * frames, budget) * FRAME
        for head in (0, 1):
            for row in (0, 1):
                held = ids(tokens, row, head)
                assert held == sorted(set(held))
                assert all(
                    torch.equal(k, chunks[0, t // (frames * FRAME), row, t % (frames * FRAME), head])
                    for t, k in zip(held, tokens.keys[row, :, head], strict=True)
                )
                if which == "h2o" and index:
                    last = index * frames * FRAME
                    assert held[-recent * FRAME :] == list(range(max(0, last - recent * FRAME), last))
            assert ids(tokens, 1, head) == ids(alone[index], 0, head)


@pytest.mark.parametrize(
    "memory",
    [
        FlowCache(),
        FlowCache(chunk_frames=1, budget_frames=2, mix=0.5, max_queries=7),
        HeavyHitters(),
        HeavyHitters(chunk_frames=2, budget_frames=5, recent_frames=3, max_queries=7),
        Magi(),
        Magi(chunk_frames=1, previous_chunks=(2, 0), clean_chunks=3),
    ],
)
def test_each_keeps_the_contract(memory):
    check_memory(memory)
    half = replace(TINY, dtype=torch.bfloat16)
    outs = [run_session(Session(memory, half), 7, batch=2)[-1] for _ in range(2)]
    assert outs[0].dtype == torch.bfloat16
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("memory", "options", "message"),
    [
        (FlowCache, {"budget_frames": 0}, "budget_frames must be >= 1, got 0"),
        (FlowCache, {"mix": 1.5}, "mix must be a share >= 0 and <= 1, got 1.5"),
        (FlowCache, {"max_queries": 0}, "max_queries must be >= 1, got 0"),
        (HeavyHitters, {"recent_frames": 19}, "recent_frames must be <= budget 18, got 19"),
        (HeavyHitters, {"recent_frames": 0}, "recent_frames must be >= 1, got 0"),
        (Magi, {"previous_chunks": ()}, r"previous_chunks must be a number for each step, as \(5, 4, 3, 2\), got \(\)"),
        (Magi, {"previous_chunks": (3, -1)}, r"previous_chunks\[1\] must be >= 0, got -1"),
        (Magi, {"clean_chunks": -1}, "clean_chunks must be >= 0, got -1"),
    ],
)
def test_wrong_options_say_what_is_right(memory, options, message):
    with pytest.raises(InvalidOptionError, match=message):
        memory(**options)
