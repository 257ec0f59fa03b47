"""The window that the refiner of SANA-WM was trained with (arXiv 2605.15178)."""

from kvpack.errors import require_int
from kvpack.memory import Commit
from kvpack.memory.stack import Stack
from kvpack.policies.all_blocks import AllSelector
from kvpack.policies.identity import IdentityCompressor
from kvpack.policies.sink_mid_recent import SinkMidRecentPartitioner
from kvpack.policies.sink_shift import SinkShiftReindexer


def sana_wm(*, window_frames: int = 11, sink_frames: int = 1, chunk_frames: int = 3, commit: Commit = "rerun") -> Stack:
    """Keep a sink that moves along in front of the last frames (SANA-WM, arXiv 2605.15178).

    Equal to `SanaWMLTX2Refiner`'s own memory in diffusers, whose `kv_max_frames` is `window_frames` here.

    Args:
        window_frames: latent frames attended, the sink included, the current chunk not.
        sink_frames: first latent frames, never dropped.
        chunk_frames: latent frames generated together.
        commit: which keys and values become history, those of a "rerun" or of the "last-step" (see `Stack`).

    Raises:
        InvalidOptionError: if the window holds nothing but the sink.
    """
    require_int("window_frames", window_frames, minimum=require_int("sink_frames", sink_frames) + 1)
    return Stack(
        "sana-wm",
        SinkMidRecentPartitioner(sink_frames, window_frames - sink_frames),
        IdentityCompressor(),
        AllSelector(),
        SinkShiftReindexer(),
        chunk_frames,
        archive_blocks=0,
        commit=commit,
    )
