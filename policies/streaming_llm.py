"""Attention sinks and a window, positions counted inside the cache (StreamingLLM, arXiv 2309.17453, section 3.2)."""

from kvpack.memory.stack import Stack
from kvpack.policies.all_blocks import AllSelector
from kvpack.policies.contiguous import ContiguousReindexer
from kvpack.policies.identity import IdentityCompressor
from kvpack.policies.window import WindowPartitioner


def streaming_llm(*, chunk_frames: int = 4, window_frames: int = 20, sink_frames: int = 4) -> Stack:
    """Keep the first frames and the last ones, at the positions that they have in the cache.

    Differs from the paper, whose sink is the first four tokens of a text: here it is the first latent frames.

    Args:
        chunk_frames: latent frames generated together.
        window_frames: latent frames attended, the sink and the current chunk included.
        sink_frames: first latent frames that are never dropped.
    """
    return Stack(
        "streaming-llm",
        WindowPartitioner(window_frames, sink_frames),
        IdentityCompressor(),
        AllSelector(),
        ContiguousReindexer(),
        chunk_frames,
    )
