"""`check_memory` refuses memories that are wrong where their results alone do not show it."""

from dataclasses import dataclass, field
from itertools import cycle

import pytest
import torch

from kvpack.errors import InvalidOptionError, PolicyError
from kvpack.memory import Attended, StateMemory
from kvpack.memory.session import Session
from kvpack.policies import self_forcing
from kvpack.testing import TINY, check_memory, check_policy, run_session

TURNS = cycle((True, False))


@dataclass(frozen=True)
class Last(StateMemory):
    """Attends the last chunk; `how` it goes wrong is said by the tests."""

    chunk_frames: int = 1
    replay_frames: int = 1
    name = "acme-last"

    def attend(self, state, chunk):
        held = chunk.tokens[:0] if state is None else state
        return Attended((held,), float(chunk.first_frame), held)

    def remember(self, state, chunk):
        return (state + chunk.tokens)[-2 * len(chunk.tokens) :]

    def forget(self, state, tokens):
        return state[: len(state) - tokens]


class Vetoing(Last):
    """Vetoes no row."""

    max_retries = 1

    def veto(self, state, latents):
        return torch.zeros(len(latents), dtype=torch.bool), state


def wrong(base=Last, **members):
    """Return a memory of a subclass."""
    return type("Wrong", (base,), members)()


def after(method, what, base=Last):
    """Return a memory one of whose methods also does something to its arguments."""

    def changed(self, *given):
        made = getattr(base, method)(self, *given)
        what(*given)
        return made

    return wrong(base, **{method: changed})


@pytest.mark.parametrize("base", [Last, Vetoing])
def test_what_the_wrong_ones_are_made_of_is_right(base):
    check_memory(base())


@pytest.mark.parametrize(
    ("method", "write"),
    [
        ("attend", lambda _, chunk: chunk.queries.mul_(2)),
        ("attend", lambda _, chunk: chunk.tokens.keys.mul_(2)),
        ("attend", lambda state, _: state is None or state.values.zero_()),
        ("remember", lambda _, chunk: chunk.tokens.values.zero_()),
        ("forget", lambda state, _: state.keys.mul_(2)),
        ("veto", lambda _, latents: latents.zero_()),
    ],
)
def test_writing_into_what_is_given_is_refused(method, write):
    memory = after(method, write, Vetoing)
    with pytest.raises(PolicyError, match=f"Wrong.{method} writes in place into a tensor"):
        check_memory(memory)


class Bare(StateMemory):
    name = "acme-bare"
    chunk_frames = 1
    attend, remember = Last.attend, Last.remember


@dataclass
class Thawed(Bare):
    chunk_frames: int = 1


@dataclass(frozen=True)
class Listing(Last):
    layers: list[int] = field(default_factory=lambda: [1, 2])


@dataclass(frozen=True)
class Nested(Last):
    inner: Last = field(default_factory=Last)


@dataclass(frozen=True)
class Nameless(StateMemory):
    chunk_frames: int = 1
    attend, remember = Last.attend, Last.remember


@dataclass(frozen=True)
class Endless(StateMemory):
    name = "acme-endless"
    attend, remember = Last.attend, Last.remember


@dataclass(frozen=True)
class Unforgetting(Nameless):
    name = "acme-unforgetting"
    replay_frames: int = 1


@pytest.mark.parametrize(
    ("memory", "error", "said"),
    [
        (Bare(), PolicyError, "Bare must be a frozen dataclass"),
        (Thawed(), PolicyError, "Thawed must be a frozen dataclass"),
        (Listing(), PolicyError, r"cannot be written as data, layers = \[1, 2\]; use numbers, text and tuples"),
        (Nested(), PolicyError, r"cannot be written as data, inner = Last\(.*; use numbers, text and tuples"),
        (Nameless(), InvalidOptionError, "the name of Nameless is None, but it must be kebab-case"),
        (Endless(), InvalidOptionError, "Endless has no chunk_frames, the latent frames generated together"),
        (Last(chunk_frames=0), InvalidOptionError, "chunk_frames of Last must be >= 1, got 0"),
        (Unforgetting(), InvalidOptionError, r"Unforgetting has replay_frames, so it must have forget\(\)"),
        (wrong(max_retries=1), InvalidOptionError, r"Wrong has max_retries, so it must have veto\(\)"),
        (wrong(start=lambda *_: {}["lost"]), PolicyError, r"Wrong fails in torch\.float32: KeyError: 'lost'"),
    ],
)
@pytest.mark.parametrize("check", [check_memory, check_policy])
def test_what_is_no_memory_is_told_why(check, memory, error, said):
    with pytest.raises(error, match=said):
        check(memory)


@pytest.mark.parametrize(
    ("veto", "said"),
    [
        (lambda *_: torch.zeros(1) > 0, r"torch.bool \(1,\) in layer 0, but rows are torch.bool \(2,\)"),
        (lambda *_: torch.zeros(2), r"returned torch.float32 \(2,\) in layer 0"),
        (lambda *_: False, "returned bool in layer 0"),
        (lambda *_: torch.full((2,), next(TURNS)), "vetoes other rows in one layer than in another"),
    ],
)
@pytest.mark.parametrize("retries", [0, 1])
def test_a_veto_is_of_rows(veto, said, retries):
    memory = wrong(veto=lambda _, *given: (veto(*given), given[0]), max_retries=retries)
    with pytest.raises(PolicyError, match=said):
        check_memory(memory)


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), lambda: torch.manual_seed(0)])
def test_torchs_global_generator_is_the_users(draw):
    with pytest.raises(PolicyError, match="Wrong draws from torch's global generator, or seeds it"):
        check_memory(after("attend", lambda *_: draw()))


def test_a_replay_behind_a_cut_is_tried():
    """What a memory forgets then is more than it has left."""

    def forget(_, state, tokens):
        return state[: list(range(len(state) + 1)).index(len(state) - tokens)]

    memory = wrong(replay_frames=1, happened=lambda _, state, event: state[:0], forget=forget)
    with pytest.raises(PolicyError, match=r"Wrong fails in torch.float32: ValueError: -20 is not in list"):
        check_memory(memory)


def test_a_joint_replay_in_the_first_chunk_forgets_nothing():
    def forget(_, state, tokens):
        assert state is not None
        return state[: len(state) - tokens]

    session = Session(wrong(replay_frames=2, replays_always=True, replays_jointly=True, forget=forget), TINY)
    session.rewind(sum(session.replays(1)) - 1)
    run_session(session, 2)


@pytest.mark.parametrize("made", [None, torch.zeros(2) > 0, (torch.zeros(3) > 0, None)])
def test_the_engine_refuses_a_veto_of_anything_else(made):
    session = Session(wrong(veto=lambda *_: made, max_retries=1), TINY)
    run_session(session, 1, batch=2)
    with pytest.raises(PolicyError, match=r"Wrong\.veto returned .* in layer 0, but"):
        session.review(torch.zeros(2, 16, 1, 8, 10))


def test_a_state_to_try_again_with_is_tried():
    memory = wrong(veto=lambda _, state, latents: (torch.ones(len(latents)) > 0, "nothing"), max_retries=1)
    with pytest.raises(PolicyError, match=r"Wrong\.attend returned str in layer 0, but it must be Tokens"):
        check_memory(memory)


def test_a_stack_is_no_part_of_another_memory():
    inner = self_forcing(chunk_frames=1, window_frames=4, sink_frames=1)
    memory = wrong(start=lambda _, *given: inner.start(*given), attend=lambda _, *given: inner.attend(*given))
    with pytest.raises(PolicyError, match="self-forcing is a Stack, which is no part of another memory"):
        run_session(Session(memory, TINY), 1)
