"""`check_memory` refuses memories that are wrong where their results alone do not show it."""

from dataclasses import dataclass, field

import pytest

from kvpack.errors import InvalidOptionError, PolicyError
from kvpack.memory import Attended, StateMemory
from kvpack.testing import check_memory, check_policy


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


def wrong(base=Last, **members):
    """Return a memory of a subclass."""
    return type("Wrong", (base,), members)()


def test_what_the_wrong_ones_are_made_of_is_right():
    check_memory(Last())


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
        (Nameless(), PolicyError, "Nameless has no name to be written down by; give its class one"),
        (Endless(), InvalidOptionError, "Endless has no chunk_frames, the latent frames generated together"),
        (Last(chunk_frames=0), InvalidOptionError, "chunk_frames of Last must be >= 1, got 0"),
        (Unforgetting(), PolicyError, r"fails in torch\.float32: NotImplementedError: .* it must have forget\(\)"),
        (wrong(start=lambda *_: {}["lost"]), PolicyError, r"Wrong fails in torch\.float32: KeyError: 'lost'"),
    ],
)
@pytest.mark.parametrize("check", [check_memory, check_policy])
def test_what_is_no_memory_is_told_why(check, memory, error, said):
    with pytest.raises(error, match=said):
        check(memory)
