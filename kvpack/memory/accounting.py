"""What a session holds, in tokens and bytes."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvpack.memory.archive import Archive
from kvpack.memory.codec import stored_bytes
from kvpack.memory.divided import Divided
from kvpack.memory.divided_layer import DividedLayer
from kvpack.memory.layer import LayerCache
from kvpack.memory.stack_plan import StackBook
from kvpack.memory.store import StoredBlock

if TYPE_CHECKING:
    from kvpack.memory.session import Session


def session_stats(session: "Session") -> dict[str, Any]:
    """Return tokens and bytes of a session.

    `attended_*` are those of the last chunk's history, without the chunk; `archive_*` all compressed blocks that are
    kept, attended or not, in the form and on the tier that they are stored. `resident_bytes` is all memory beside the
    model that is held between two chunks: arenas with room for the largest chunk, archives with their spare slots
    unless they are on another tier, the states' own tensors, and the workspace, which is `workspace_bytes` of them and
    is one for all layers. Where heads attend unlike numbers of tokens, `attended_tokens` is the mean, rounded up.
    """
    memory, book, geometry = session.stack, session.past.book, session.geometry
    per_head = geometry.kv_bytes_per_token // geometry.layers // geometry.heads
    attended = sum(sum(cache.lengths) * heads for cache, heads in _leaves(session))
    stats: dict[str, Any] = {"stack": memory.name, "chunks": book.chunks, "frames": book.frames}
    blocks, archived = 0, 0
    if isinstance(book, StackBook):
        whole = book.ledger.whole
        for part in ("sink", "recent"):
            frames = sum(piece.frames for piece in whole if piece.part == part)
            stats[f"{part}_tokens"] = frames * geometry.tokens_per_frame
        blocks = len(book.ledger.archive)
        compressor = memory.compressor  # type: ignore[attr-defined]  # it is a stack
        shape, codec = (geometry.heads, geometry.head_dim, geometry.dtype), memory.store  # type: ignore[attr-defined]
        lengths = [each.block_frames for each in book.ledger.archive]
        stored = {n: stored_bytes(codec, compressor.span(0, n, geometry.grid).tokens, *shape) for n in set(lengths)}
        rows = session.past.states[0].archive.key_sums.shape[0] if lengths else 0
        archived = sum(stored[frames] for frames in lengths) * rows * geometry.layers
    chosen = [cache.selected.tolist() for cache in session.caches if cache.selected is not None]
    return {
        **stats,
        "attended_tokens": _attended_tokens(session),
        "attended_bytes": attended * per_head,
        "archive_blocks": blocks,
        "archive_bytes": archived,
        "resident_bytes": resident_bytes(session),
        "workspace_bytes": _workspace_bytes(session),
        "selected": chosen or None,
        "policy_seconds": dict(session.policy_seconds),
    }


def stats_of_all(sessions: Mapping[str, "Session"]) -> dict[str, Any]:
    """Return tokens of the first session, and bytes of all, which are one for each guidance branch."""
    each = [session.stats() for session in sessions.values()]
    if not each:
        return {"chunks": 0, "branches": [], "policy_seconds": {}}
    total = {key: sum(stats[key] for stats in each) for key in each[0] if key.endswith("_bytes")}
    spent = [stats["policy_seconds"] for stats in each]  # the first branch runs every policy that any branch runs
    policies = {name: sum(part.get(name, 0.0) for part in spent) for name in spent[0]}
    return {**each[0], **total, "branches": list(sessions), "policy_seconds": policies}


def resident_bytes(session: "Session") -> int:
    """Return the bytes of all storages that the session holds, each counted once."""
    storages = {}
    for tensor in _tensors(session.past.states):
        storage = tensor.untyped_storage()
        # Tensors without memory, as on meta, all have the address 0; an id is unique while its object is held.
        storages[storage.data_ptr() or id(storage)] = storage
    held = sum(leaf.arena.nbytes for leaf, _ in _leaves(session)) + _workspace_bytes(session)
    return held + sum(each.nbytes() for each in storages.values())


def _leaves(session: "Session") -> Iterator[tuple[LayerCache, int]]:
    """Yield what holds keys and values, with the number of heads that it holds them of."""
    for cache in session.caches:
        if isinstance(cache, DividedLayer):
            yield from zip(cache.leaves, (len(part.heads) for part in cache.parts), strict=True)
        else:
            yield cache, session.geometry.heads


def _workspace_bytes(session: "Session") -> int:
    # A set, since layers share workspaces.
    return sum(each.nbytes for each in {leaf.workspace for leaf, _ in _leaves(session)})


def _attended_tokens(session: "Session") -> int:
    """Return the tokens of history that the first layer attends; of a divided memory the mean of all heads."""
    if not isinstance(session.stack, Divided):
        return max(session.caches[0].lengths, default=0)
    heads = session.geometry.layers * session.geometry.heads
    return ceil(sum(max(leaf.lengths, default=0) * count for leaf, count in _leaves(session)) / heads)


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
