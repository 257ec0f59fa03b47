"""Named stacks: policies that belong together, under the name of their paper."""

import inspect
from typing import Any

from kvpack.policies.all_blocks import AllSelector
from kvpack.policies.full import FullPartitioner
from kvpack.policies.identity import IdentityCompressor
from kvpack.policies.sink_mid_recent import SinkMidRecentPartitioner
from kvpack.policies.window import WindowPartitioner
from kvpack.registry import registry
from kvpack.roles import Compressor, Reindexer, Selector
from kvpack.stack import Stack


def packforcing(
    *,
    topk: int = 16,
    sink_frames: int = 8,
    recent_frames: int = 4,
    chunk_frames: int = 4,
    compressor: str | Compressor = "pool",
    selector: str | Selector = "topk",
    reindex: str | Reindexer = "contiguous",
    train_frames: int = 20,
    archive_blocks: int | None = None,
    name: str = "packforcing",
) -> Stack:
    """Sink, compressed mid and recent (PackForcing, arXiv 2603.25730).

    Args:
        topk: mid blocks attended.
        sink_frames: first latent frames, whole.
        recent_frames: last latent frames, whole.
        chunk_frames: latent frames generated together.
        compressor: name or instance.
        selector: name or instance.
        reindex: name or instance of a re-indexer.
        train_frames: latent frames seen in training, for `reindex="fit"`.
        archive_blocks: most compressed blocks kept; None keeps all.
        name: name of the stack.
    """
    return Stack(
        name,
        SinkMidRecentPartitioner(sink_frames, recent_frames),
        _policy("compressor", compressor),
        _policy("selector", selector, topk=topk),
        _policy("reindexer", reindex, train_frames=train_frames),
        chunk_frames,
        archive_blocks,
    )


def packforcing_fit(
    *,
    topk: int = 16,
    sink_frames: int = 8,
    recent_frames: int = 4,
    chunk_frames: int = 4,
    compressor: str | Compressor = "pool",
    selector: str | Selector = "topk",
    train_frames: int = 20,
    archive_blocks: int | None = None,
) -> Stack:
    """As packforcing, with mid blocks squeezed into the positions that the model saw in training."""
    return packforcing(**locals(), reindex="fit", name="packforcing-fit")


def self_forcing(
    *,
    chunk_frames: int = 3,
    window_frames: int = 9,
    sink_frames: int = 3,
    reindex: str | Reindexer = "absolute",
    train_frames: int = 20,
) -> Stack:
    """Rolling window with a sink (Self-Forcing, arXiv 2506.08009; the window includes the current chunk)."""
    return Stack(
        "self-forcing",
        WindowPartitioner(window_frames, sink_frames),
        IdentityCompressor(),
        AllSelector(),
        _policy("reindexer", reindex, train_frames=train_frames),
        chunk_frames,
    )


def full(*, chunk_frames: int = 4, reindex: str | Reindexer = "absolute", train_frames: int = 20) -> Stack:
    """All of history at full resolution; memory and time grow with the video."""
    reindexer = _policy("reindexer", reindex, train_frames=train_frames)
    return Stack("full", FullPartitioner(), IdentityCompressor(), AllSelector(), reindexer, chunk_frames)


def _policy(role: str, policy: Any, **offered: Any) -> Any:
    """A policy by name, given those of the offered options that it takes."""
    cls = registry().policies.get((role, policy)) if isinstance(policy, str) else None
    taken = inspect.signature(cls).parameters if cls else {}
    return registry().policy(role, policy, {name: value for name, value in offered.items() if name in taken})
