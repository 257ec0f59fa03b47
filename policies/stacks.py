"""Named stacks: policies that belong together, under the name of their paper."""

import inspect
import os
from typing import Any

from kvpack.errors import UnknownNameError
from kvpack.memory import Commit
from kvpack.memory.blocks import Coordinates
from kvpack.memory.roles import Compressor, Reindexer, Selector
from kvpack.memory.stack import Selection, Stack
from kvpack.plugins.registry import registry
from kvpack.policies.all_blocks import AllSelector
from kvpack.policies.contiguous import ContiguousReindexer
from kvpack.policies.dual import trained_compressor
from kvpack.policies.full import FullPartitioner
from kvpack.policies.identity import IdentityCompressor
from kvpack.policies.lr import LowResolutionCompressor
from kvpack.policies.sink_mid_recent import SinkMidRecentPartitioner
from kvpack.policies.topk import QueryTopK
from kvpack.policies.window import WindowPartitioner


def packforcing(
    *,
    topk: int = 16,
    sink_frames: int = 8,
    recent_frames: int = 4,
    chunk_frames: int = 4,
    compressor: str | Compressor = "pool",
    selector: str | Selector = "topk",
    reindexer: str | Reindexer = "fit",
    train_frames: int = 20,
    archive_blocks: int | None = None,
    coordinates: Coordinates = "centered",
    selection: Selection = "layer",
    commit: Commit = "rerun",
) -> Stack:
    """Build a memory of sink, compressed mid and recent (PackForcing, arXiv 2603.25730).

    Differs from the paper, whose own configuration is `packforcing-paper`: mid blocks are squeezed into the positions
    that the model saw in training, and keys and values are pooled, which needs no VAE.

    Args:
        topk: mid blocks attended, for a selector by name that takes it; with 0 none are archived.
        sink_frames: first latent frames, whole.
        recent_frames: last latent frames, whole.
        chunk_frames: latent frames generated together.
        compressor: name or instance, or folder or Hub id of a trained one, which is used as its config says.
        selector: name or instance.
        reindexer: name or instance of a re-indexer.
        train_frames: latent frames seen in training, for `reindexer="fit"`.
        archive_blocks: most compressed blocks kept; None keeps all.
        coordinates: where pooled tokens sit, for a compressor by name that takes it (see `PoolCompressor`).
        selection: whether each "layer" chooses mid blocks, or the first one for the whole "chunk" (see `Stack`).
        commit: which keys and values become history, those of a "rerun" or of the "last-step" (see `Stack`).
    """
    chosen_by = _policy("selector", selector, topk=topk)
    if getattr(chosen_by, "topk", None) == 0:
        archive_blocks = 0  # nothing of it would ever be attended
    return Stack(
        "packforcing",
        SinkMidRecentPartitioner(sink_frames, recent_frames),
        _compressor(compressor, coordinates),
        chosen_by,
        _policy("reindexer", reindexer, train_frames=train_frames),
        chunk_frames,
        archive_blocks,
        selection,
        commit,
    )


def packforcing_paper() -> Stack:
    """Build the paper's own untrained configuration (arXiv 2603.25730); it has no options, so that it stays one.

    `lr` is what the paper's dual-branch compressor is before it is trained. Scores are exact where the paper samples
    queries and heads, and a batch row's own where it averages over the batch.
    """
    return Stack(
        "packforcing-paper",
        SinkMidRecentPartitioner(sink_frames=8, recent_frames=4),
        LowResolutionCompressor(coordinates="centered"),
        QueryTopK(topk=16, after_rope=False),
        ContiguousReindexer(),
        chunk_frames=4,
        archive_blocks=None,
        selection="layer",
        commit="rerun",
    )


def self_forcing(
    *,
    chunk_frames: int = 3,
    window_frames: int = 9,
    sink_frames: int = 3,
    reindexer: str | Reindexer = "absolute",
    train_frames: int = 20,
    commit: Commit = "rerun",
) -> Stack:
    """Build a rolling window with a sink (Self-Forcing, arXiv 2506.08009); the window includes the current chunk."""
    return Stack(
        "self-forcing",
        WindowPartitioner(window_frames, sink_frames),
        IdentityCompressor(),
        AllSelector(),
        _policy("reindexer", reindexer, train_frames=train_frames),
        chunk_frames,
        commit=commit,
    )


def full(
    *,
    chunk_frames: int = 4,
    reindexer: str | Reindexer = "absolute",
    train_frames: int = 20,
    commit: Commit = "rerun",
) -> Stack:
    """Keep all of history at full resolution, which grows (Self-Forcing, arXiv 2506.08009, global attention)."""
    return Stack(
        "full",
        FullPartitioner(),
        IdentityCompressor(),
        AllSelector(),
        _policy("reindexer", reindexer, train_frames=train_frames),
        chunk_frames,
        commit=commit,
    )


def _compressor(compressor: str | Compressor, coordinates: Coordinates) -> Any:
    """Return a compressor by name, or by the folder or Hub id of its weights; installed names win."""
    installed = ("compressor", compressor) in registry().policies
    if isinstance(compressor, str) and not installed and ("/" in compressor or os.path.isdir(compressor)):
        return trained_compressor(compressor)
    try:
        return _policy("compressor", compressor, coordinates=coordinates)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}; a folder or Hub id of trained weights works too") from None


def _policy(role: str, policy: Any, **offered: Any) -> Any:
    """Return a policy by name, given those of the offered options that it takes."""
    cls = registry().policies.get((role, policy)) if isinstance(policy, str) else None
    taken = inspect.signature(cls).parameters if cls else {}
    return registry().policy(role, policy, {name: value for name, value in offered.items() if name in taken})
