"""Named stacks: policies that belong together, under the name of their paper."""

import os
from typing import Any

from kvpack.errors import UnknownNameError, UnusedOptionError
from kvpack.memory import Commit
from kvpack.memory.blocks import Coordinates
from kvpack.memory.roles import Compressor, Reindexer, Selector
from kvpack.memory.stack import Stack
from kvpack.plugins.registry import registry
from kvpack.plugins.resolve import resolve_policy
from kvpack.policies.all_blocks import AllSelector
from kvpack.policies.contiguous import ContiguousReindexer
from kvpack.policies.dual import trained_compressor
from kvpack.policies.full import FullPartitioner
from kvpack.policies.identity import IdentityCompressor
from kvpack.policies.lr import LowResolutionCompressor
from kvpack.policies.sink_mid_recent import SinkMidRecentPartitioner
from kvpack.policies.topk import QueryTopK
from kvpack.policies.window import WindowPartitioner

_POSITIONS = {"train_frames": 20}

#: Most compressed blocks that `packforcing` keeps: those of two minutes at chunks of four latent frames.
_ARCHIVE_BLOCKS = 128


def packforcing(
    *,
    topk: int | None = None,
    sink_frames: int = 8,
    recent_frames: int = 4,
    chunk_frames: int = 4,
    compressor: str | os.PathLike[str] | Compressor = "keep-farthest",
    selector: str | Selector = "softmax-mass",
    reindexer: str | Reindexer = "fit",
    train_frames: int | None = None,
    archive_blocks: int | None = _ARCHIVE_BLOCKS,
    coordinates: Coordinates | None = None,
    keep_tokens: int | float | None = None,
    share_selection: bool = False,
    commit: Commit = "rerun",
) -> Stack:
    """Build a memory of sink, compressed mid and recent (PackForcing, arXiv 2603.25730).

    Differs from the paper, whose own configuration is `packforcing-paper`: mid blocks are squeezed into the positions
    that the model saw in training; they are tokens of their own that differ most, which needs no VAE; and those are
    attended that would take the most attention, not those with the largest sum of q . k.

    Args:
        topk: mid blocks attended, for a selector by name that takes it, 16 if None; with 0 none are archived.
        sink_frames: first latent frames, whole.
        recent_frames: last latent frames, whole.
        chunk_frames: latent frames generated together.
        compressor: name or instance, or folder or Hub id of a trained one, which is used as its config says.
        selector: name or instance.
        reindexer: name or instance of a re-indexer.
        train_frames: latent frames seen in training, for a re-indexer by name that takes it, 20 if None.
        archive_blocks: most compressed blocks kept, so that memory is bounded; None keeps all.
        coordinates: where pooled tokens sit, for a compressor by name that takes it (see `PoolCompressor`); "centered"
            if None.
        keep_tokens: tokens kept of each block, or a share of them below 1, for a compressor by name that takes it; as
            many as `pool` makes if None.
        share_selection: whether the first layer chooses mid blocks for all layers, instead of each its own.
        commit: which keys and values become history, those of a "rerun" or of the "last-step" (see `Stack`).

    Raises:
        UnusedOptionError: if an option is given that the policy beside it does not take.
    """
    chosen_by = resolve_policy("selector", selector, {"topk": 16}, topk=topk)
    if getattr(chosen_by, "topk", None) == 0:
        if archive_blocks not in (0, None, _ARCHIVE_BLOCKS):  # the default was not asked for
            raise UnusedOptionError(
                "archive_blocks", "with topk=0 no block is attended, and none is kept; leave it out"
            )
        archive_blocks = 0
    return Stack(
        "packforcing",
        SinkMidRecentPartitioner(sink_frames, recent_frames),
        _compressor(compressor, coordinates, keep_tokens, chunk_frames),
        chosen_by,
        resolve_policy("reindexer", reindexer, _POSITIONS, train_frames=train_frames),
        chunk_frames,
        archive_blocks,
        share_selection,
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
        share_selection=False,
        commit="rerun",
    )


def self_forcing(
    *,
    chunk_frames: int = 3,
    window_frames: int = 9,
    sink_frames: int = 3,
    reindexer: str | Reindexer = "absolute",
    train_frames: int | None = None,
    commit: Commit = "rerun",
) -> Stack:
    """Build a rolling window with a sink (Self-Forcing, arXiv 2506.08009).

    Args:
        chunk_frames: latent frames generated together.
        window_frames: latent frames attended, the sink and the current chunk included.
        sink_frames: first latent frames that are never dropped.
        reindexer: name or instance of a re-indexer.
        train_frames: latent frames seen in training, for a re-indexer by name that takes it, 20 if None.
        commit: which keys and values become history (see `Stack`).
    """
    return Stack(
        "self-forcing",
        WindowPartitioner(window_frames, sink_frames),
        IdentityCompressor(),
        AllSelector(),
        resolve_policy("reindexer", reindexer, _POSITIONS, train_frames=train_frames),
        chunk_frames,
        commit=commit,
    )


def full(
    *,
    chunk_frames: int = 4,
    reindexer: str | Reindexer = "absolute",
    train_frames: int | None = None,
    commit: Commit = "rerun",
) -> Stack:
    """Keep all of history at full resolution, which grows (Self-Forcing, arXiv 2506.08009, global attention)."""
    return Stack(
        "full",
        FullPartitioner(),
        IdentityCompressor(),
        AllSelector(),
        resolve_policy("reindexer", reindexer, _POSITIONS, train_frames=train_frames),
        chunk_frames,
        commit=commit,
    )


def _compressor(
    compressor: str | os.PathLike[str] | Compressor,
    coordinates: Coordinates | None,
    keep_tokens: int | float | None,
    chunk_frames: int,
) -> Any:
    """Return a compressor by name, or by the folder or Hub id of its weights; installed names win."""
    compressor = os.fspath(compressor) if isinstance(compressor, os.PathLike) else compressor
    if (
        isinstance(compressor, str)
        and ("compressor", compressor) not in registry().policies
        and ("/" in compressor or os.path.isdir(compressor))
    ):
        for option, given in (("coordinates", coordinates), ("keep_tokens", keep_tokens)):
            if given is not None:
                raise UnusedOptionError(option, f"{compressor} was trained with its own, which its config has")
        return trained_compressor(compressor, chunk_frames)
    try:
        usual = {"coordinates": "centered"}
        return resolve_policy("compressor", compressor, usual, coordinates=coordinates, keep_tokens=keep_tokens)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}; a folder or Hub id of trained weights works too") from None
