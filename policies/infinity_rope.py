"""A short window at positions from 0 on, flushed for an action, cut for a scene (Infinity-RoPE, arXiv 2511.20649)."""

from dataclasses import dataclass, replace

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory import Attended, Chunk, Event, StateMemory, Tokens, consecutive


@dataclass(frozen=True, eq=False)
class InfinityState:
    """Sink and window, and what has happened since the last chunk."""

    sink: Tokens
    recent: Tokens
    flush: bool = False
    cut: bool = False


@dataclass(frozen=True)
class InfinityRoPE(StateMemory):
    """The first frame and the last ones at consecutive positions, so that no position is ever new to the model.

    A new prompt flushes the window but for its last frames, so that an action begins at once (KV flush); nothing is
    computed anew. The first chunk of a new scene is placed far behind its history, which then counts for little (RoPE
    cut).

    Args:
        chunk_frames: latent frames generated together.
        window_frames: latent frames attended, the sink and the current chunk included.
        sink_frames: first latent frames that are never dropped.
        flushed_frames: last latent frames that a flush leaves.
        cut_position: temporal position of a new scene's first frame.

    Raises:
        InvalidOptionError: if the sink, the frames that a flush leaves and the chunk do not fit into the window.
    """

    chunk_frames: int = 3
    window_frames: int = 6
    sink_frames: int = 1
    flushed_frames: int = 2
    cut_position: int = 45
    name = "infinity-rope"
    by_head = True

    def __post_init__(self) -> None:
        require_int("chunk_frames", self.chunk_frames, minimum=1)
        for option in ("sink_frames", "flushed_frames", "cut_position"):
            require_int(option, getattr(self, option))
        least = self.sink_frames + self.flushed_frames + self.chunk_frames
        if self.window_frames < least:
            raise InvalidOptionError(
                f"window_frames must be at least {least} (a sink of {self.sink_frames}, {self.flushed_frames} frames "
                f"behind a flush, and the chunk), got {self.window_frames}"
            )

    def attend(self, state: InfinityState | None, chunk: Chunk) -> Attended:
        """Attend the sink and as many of the last frames as fit, without gaps from 0."""
        state = state or InfinityState(chunk.tokens[:0], chunk.tokens[:0])
        each = chunk.geometry.tokens_per_frame
        room = self.window_frames * each - len(state.sink) - len(chunk.tokens)
        room = self.flushed_frames * each if state.flush else room
        recent = state.recent[max(0, len(state.recent) - room) :]
        placed, start = consecutive([state.sink, recent], frame_tokens=each)
        # RoPE cut: the released code places a new scene's first chunk at 45 to 47.
        if state.cut:
            start = max(start, float(self.cut_position))  # never before its own history, were that longer
        # The state without its events, which hold for one chunk.
        return Attended(tuple(placed), start, InfinityState(state.sink, recent))

    def remember(self, state: InfinityState, chunk: Chunk) -> InfinityState:
        """Fill the sink, then the window."""
        free = self.sink_frames * chunk.geometry.tokens_per_frame - len(state.sink)
        return replace(state, sink=state.sink + chunk.tokens[:free], recent=state.recent + chunk.tokens[free:])

    def happened(self, state: InfinityState | None, event: Event) -> InfinityState | None:
        """Store the event for the next chunk."""
        if state is None:
            return None
        return replace(state, flush=True) if event == "prompt-changed" else replace(state, cut=True)
