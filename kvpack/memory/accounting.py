"""What a session holds, in tokens and bytes."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvpack.memory.archive import Archive
from kvpack.memory.codec import stored_bytes
from kvpack.memory.stack_plan import StackBook
from kvpack.memory.store import StoredBlock

if TYPE_CHECKING:
    from kvpack.memory.session import Session


def session_stats(session: "Session") -> dict[str, Any]:
    """Return tokens and bytes of a session.

    `attended_*` are those of the last chunk's history, without the chunk; `archive_*` all compressed blocks that are
    kept, attended or not, in the form and on the tier that they are stored. `resident_bytes` is all memory beside the
    model that is held between two chunks: arenas with the room for the current chunk, archives with their spare slots
    unless they are on another tier, the states' own tensors, and the workspace, which is `workspace_bytes` of them and
    is one for all layers.
    """
    memory, book, geometry = session.stack, session.past.book, session.geometry
    lengths = [length for cache in session.caches for length in cache.lengths]
    per_layer = geometry.kv_bytes_per_token // geometry.layers
    stats: dict[str, Any] = {"stack": memory.name, "chunks": book.chunks, "frames": book.frames}
    blocks, archived = 0, 0
    if isinstance(book, StackBook) and book.ledger is not None:
        whole = book.ledger.whole
        for part in ("sink", "recent"):
            frames = sum(piece.frames for piece in whole if piece.part == part)
            stats[f"{part}_tokens"] = frames * geometry.tokens_per_frame
        blocks = len(book.ledger.archive)
        compressor = memory.compressor  # type: ignore[attr-defined]  # it is a stack
        sizes = [compressor.span(each.first_frame, each.frames, geometry.grid).tokens for each in book.ledger.archive]
        shape, codec = (geometry.heads, geometry.head_dim, geometry.dtype), memory.store  # type: ignore[attr-defined]
        stored = {tokens: stored_bytes(codec, tokens, *shape) for tokens in set(sizes)}
        archived = sum(stored[tokens] for tokens in sizes) * _rows(session) * geometry.layers
    chosen = [cache.selected.tolist() for cache in session.caches if cache.selected is not None]
    return {
        **stats,
        "attended_tokens": max(session.caches[0].lengths, default=0),
        "attended_bytes": sum(lengths) * per_layer,
        "archive_blocks": blocks,
        "archive_bytes": archived,
        "resident_bytes": resident_bytes(session),
        "workspace_bytes": session.workspace.nbytes,
        "selected": chosen or None,
        "policy_seconds": dict(session.policy_seconds),
    }


def resident_bytes(session: "Session") -> int:
    """Return the bytes of all storages that the session holds, each counted once."""
    storages = {}
    for tensor in _tensors(session.past.states):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr() or id(storage)] = storage.nbytes()
    held = sum(cache.arena.nbytes for cache in session.caches) + session.workspace.nbytes
    return held + sum(storages.values())


def _rows(session: "Session") -> int:
    return len(session.caches[0].lengths) or 1


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in a state that lie in no arena."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, StoredBlock):
        yield from value.own
    elif isinstance(value, Archive):
        yield from value.beside_the_model
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value):
        for each in fields(value):
            yield from _tensors(getattr(value, each.name))
