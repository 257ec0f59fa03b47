"""Whether what a snapshot says fits together, before anything is generated of it."""

from typing import Any

from kvpack.errors import SnapshotError
from kvpack.generation.moment import Moment
from kvpack.generation.replay import CleanFrames
from kvpack.generation.run import Run
from kvpack.memory.geometry import Geometry
from kvpack.memory.session import Past
from kvpack.memory.stack_plan import StackBook
from kvpack.memory.stack_state import StackState
from kvpack.memory.store import StoredBlock


def check_moment(moment: Moment) -> None:
    """Raise `SnapshotError` if parts of a moment are of the wrong kind."""
    kinds: dict[str, tuple[Any, type]] = {
        "conditioning": (moment.conditioning, dict),
        "pasts": (moment.pasts, dict),
        "clean": (moment.clean, CleanFrames),
        "own_generators": (moment.own_generators, tuple),
        "prompt_changes": (moment.run.get("prompt_changes"), list),
        **{f"pasts.{name}": (past, Past) for name, past in dict(moment.pasts).items()},
    }
    for name, (value, wanted) in kinds.items():
        if not isinstance(value, wanted):
            raise SnapshotError(f"{name} is a {type(value).__name__}, but must be a {wanted.__name__}")


def check_sessions(run: Run) -> None:
    """Raise `SnapshotError` if what a generation remembers does not fit its model, or one part of it another."""
    sessions, geometry = run.sessions, run.denoiser.geometry
    if sessions and set(sessions) != set(run.denoiser.branches):
        raise SnapshotError(
            f"it has memories of {sorted(sessions)}, but the branches are {sorted(run.denoiser.branches)}"
        )
    for branch, session in sessions.items():
        past = session.past
        if len(past.states) != geometry.layers:
            raise SnapshotError(f"branch {branch} has {len(past.states)} layers, but the model {geometry.layers}")
        if past.book.frames > (run.position or (0, 0))[1]:
            raise SnapshotError(f"branch {branch} has {past.book.frames} frames, more than were generated")
        for state in past.states:
            if isinstance(state, StackState) and isinstance(past.book, StackBook):
                _check_state(state, past.book, geometry)


def _check_state(state: StackState, book: StackBook, geometry: Geometry) -> None:
    ledger = book.ledger
    if ledger is None or len(ledger.whole) != len(state.whole):
        raise SnapshotError(f"{len(state.whole)} whole blocks are there, but others are listed")
    for piece, kept in zip(ledger.whole, state.whole, strict=True):
        if len(kept.block) != piece.frames * geometry.tokens_per_frame:
            raise SnapshotError(f"a block of {piece.frames} frames has {len(kept.block)} tokens")
        _check_block(kept.block, geometry)
    slots = [piece.slot for piece in ledger.archive]
    if any(slot not in state.archive.marks for slot in slots):
        raise SnapshotError(f"blocks in the slots {sorted(set(slots) - set(state.archive.marks))} are missing")
    if state.archive.slots and tuple(state.archive.keys.shape[3:]) != (geometry.heads, geometry.head_dim):
        raise SnapshotError(f"archived keys are {tuple(state.archive.keys.shape)}, but the model is {geometry}")


def _check_block(block: StoredBlock, geometry: Geometry) -> None:
    keys = block.keys
    if tuple(keys.shape[2:]) != (geometry.heads, geometry.head_dim) or keys.dtype != geometry.dtype:
        raise SnapshotError(f"a block is {keys.dtype} {tuple(keys.shape)}, but the model is {geometry}")
