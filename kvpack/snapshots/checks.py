"""Whether what a snapshot says fits together, before anything is generated of it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from kvpack.errors import SnapshotError
from kvpack.generation.adapter import call_signature
from kvpack.generation.moment import Moment
from kvpack.generation.run import Run
from kvpack.memory.divided import Divided, DividedBook, narrowed
from kvpack.memory.geometry import Geometry
from kvpack.memory.ledger import BlockEntry
from kvpack.memory.plan import Book
from kvpack.memory.stack import Stack
from kvpack.memory.stack_plan import StackBook
from kvpack.memory.stack_state import StackState
from kvpack.memory.store import StoredBlock
from kvpack.snapshots.types import fits, is_a

#: What every run remembers, and of what kind it is.
_ATTRIBUTES: dict[str, Any] = {
    "streaming": bool,
    "call": dict,
    "output_type": str,
    "total_frames": int | None,
    "scale": int,
    "conditioning": Tensor | None,
    "first_frames": int,
    "prompt_changes": list,
    "position": tuple[int, int] | None,
    "between_chunks": bool,
    "draws_freely": bool,
    "_decodes_in_loop": bool,
    "interrupted": bool,
    "retries_nan": bool,
    "first_spread": tuple[Tensor, Tensor] | None,
}


def check_attributes(run_class: type, value: Any) -> dict[str, Any]:
    """Return attributes of a run that are of the right kinds, and none in the place of something that its class does.

    Raises:
        SnapshotError: if one is missing, of another kind, or no attribute.
    """
    if not isinstance(value, dict):
        raise SnapshotError(f"what its run remembers is a {type(value).__name__}")
    for name in value:
        found = getattr(run_class, str(name), None)
        # Set on the run, it would hide what its class does.
        if not isinstance(name, str) or callable(found) or isinstance(found, property | cached_property):
            raise SnapshotError(f"{str(name)[:40]!r} is nothing that a generation remembers")
    if missing := set(_ATTRIBUTES) - set(value):
        raise SnapshotError(f"it does not say {', '.join(sorted(missing))}")
    for name, hint in _ATTRIBUTES.items():
        if not is_a(value[name], hint):
            raise SnapshotError(f"{name} is a {type(value[name]).__name__}, but must be {hint}")
    return value


def check_moment(moment: Moment, run: Run) -> None:
    """Raise `SnapshotError` if parts of a moment are not of the kinds that it has and its run takes."""
    wrong = [*fits(Moment, vars(moment)), *fits(run.new_denoiser, {"conditioning": moment.conditioning})]
    for name, hint in wrong:
        raise SnapshotError(f"{name} is a {type(getattr(moment, name)).__name__}, but must be {hint}")
    pipeline = run.pipeline._kvpack_base
    known = {*call_signature(pipeline).parameters, *run.adapter.extra_arguments}
    if unknown := sorted(map(str, set(run.call) - known)):
        raise SnapshotError(f"its call has {', '.join(unknown)[:80]!r}, which a {pipeline.__name__} does not take")
    # Latents that are given say the size themselves.
    sized = {"height", "width"} & set(run.call) if run.call.get("latents") is None else ()
    for name in sized:
        if not is_a(run.call[name], int):
            raise SnapshotError(f"{name} of its call is a {type(run.call[name]).__name__}, but must be a number")


def check_sessions(run: Run) -> None:
    """Raise `SnapshotError` if what a generation remembers does not fit its model, or one part of it another."""
    sessions, geometry = run.sessions, run.denoiser.own_geometry
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
        for layer, state in enumerate(past.states):
            if isinstance(session.stack, Divided):
                _check_parts(session.stack, state, past.book, geometry, layer)
            elif isinstance(session.stack, Stack):
                _check_state(state, past.book, geometry)


def _check_parts(memory: Divided, state: Any, book: Book, geometry: Geometry, layer: int) -> None:
    parts = memory.parts(geometry)[layer]
    books = book.books if isinstance(book, DividedBook) else ()
    if not isinstance(state, tuple) or len(state) != len(parts) or len(books) != len(memory.stacks):
        raise SnapshotError(f"layer {layer} does not have the {len(parts)} parts of {memory.name}")
    for part, each in zip(parts, state, strict=True):
        _check_state(each, books[part.stack], narrowed(geometry, len(part.heads)))


def _check_state(state: Any, book: Book, geometry: Geometry) -> None:
    if not isinstance(state, StackState) or not isinstance(book, StackBook):
        raise SnapshotError(f"a stack has a {type(book).__name__} and, of a layer, a {type(state).__name__}")
    ledger = book.ledger
    if len(ledger.whole) != len(state.whole):
        raise SnapshotError(f"{len(state.whole)} whole blocks are there, but others are listed")
    for piece, kept in zip(ledger.whole, state.whole, strict=True):
        if len(kept.block) != piece.frames * geometry.tokens_per_frame:
            raise SnapshotError(f"a block of {piece.frames} frames has {len(kept.block)} tokens")
        _check_block(kept.block, geometry)
    _check_pieces(ledger.whole, ledger.frames)
    _check_pieces(ledger.archive, ledger.frames)
    slots = [piece.slot for piece in ledger.archive]
    if len(set(slots)) < len(slots):  # one would attend the other's tokens
        raise SnapshotError(f"its archive has two blocks in a slot, of {sorted(slots)}")
    if any(slot not in state.archive.marks for slot in slots):
        raise SnapshotError(f"blocks in the slots {sorted(set(slots) - set(state.archive.marks))} are missing")
    if state.archive.slots and tuple(state.archive.key_sums.shape[2:]) != (geometry.heads, geometry.head_dim):
        raise SnapshotError(f"sums of keys are {tuple(state.archive.key_sums.shape)}, but the model is {geometry}")


def _check_pieces(pieces: Sequence[BlockEntry], frames: int) -> None:
    stop = 0
    for piece in pieces:
        whole = piece.blocks > 0 and piece.frames > 0 and piece.frames % piece.blocks == 0
        if not whole or piece.first_frame < stop or piece.stop > frames:
            raise SnapshotError(f"it lists {piece}, which is no block of {frames} frames")
        if not 0 <= piece.chosen <= piece.offered:
            raise SnapshotError(f"a block was chosen {piece.chosen} times of {piece.offered}")
        stop = piece.stop


def _check_block(block: StoredBlock, geometry: Geometry) -> None:
    keys = block.keys
    if tuple(keys.shape[2:]) != (geometry.heads, geometry.head_dim) or keys.dtype != geometry.dtype:
        raise SnapshotError(f"a block is {keys.dtype} {tuple(keys.shape)}, but the model is {geometry}")
