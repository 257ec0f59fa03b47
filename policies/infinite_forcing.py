"""A short window behind a sink, at positions from 0 on (github.com/SOTAMak1r/Infinite-Forcing, "V-sink")."""

from dataclasses import replace

from kvpack.memory.stack import Stack
from kvpack.policies.streaming_llm import streaming_llm


def infinite_forcing(*, chunk_frames: int = 3, window_frames: int = 6, sink_frames: int = 1) -> Stack:
    """Keep the first frames and the last ones at consecutive positions, rotated when they are read ("V-sink").

    Differs from the released code: with `sink_frames` above 1 all of them are attended, where it draws one at random in
    each layer and call.

    Args:
        chunk_frames: latent frames generated together.
        window_frames: latent frames attended, the sink and the current chunk included.
        sink_frames: first latent frames that are never dropped.
    """
    made = streaming_llm(chunk_frames=chunk_frames, window_frames=window_frames, sink_frames=sink_frames)
    return replace(made, name="infinite-forcing")
