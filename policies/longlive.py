"""Sink and window, whose frames are all recomputed at once when the prompt changes (LongLive, arXiv 2509.22622)."""

from dataclasses import dataclass, replace

from kvpack.errors import require_int
from kvpack.memory import Attended, Chunk, StateMemory, Tokens, shortened
from kvpack.policies.window import require_window


@dataclass(frozen=True, eq=False)
class LongLiveState:
    """Sink and window, and whether any frame has left them."""

    sink: Tokens
    recent: Tokens
    full: bool = False


@dataclass(frozen=True)
class LongLive(StateMemory):
    """The first frames and the last ones at their positions in the video; a new prompt recomputes what is held.

    When the prompt changes, the last `window_frames` clean latents are forwarded once, all at once and each attending
    all of them. With a global sink that frames have left by then, its old keys stay: they are attended in the place of
    the first of these frames, whose own keys are dropped. Otherwise the first of them are the sink from then on.

    Differs from the released code: a sink longer than a chunk is filled with clean frames, never attended before it is
    there, and rewritten as any other frame.

    Args:
        chunk_frames: latent frames generated together.
        window_frames: latent frames attended, the sink and the current chunk included.
        sink_frames: first latent frames that are never dropped.
        global_sink: whether the sink stays what it was under the first prompt.

    Raises:
        InvalidOptionError: if no chunk of history fits into the window.
    """

    chunk_frames: int = 3
    window_frames: int = 12
    sink_frames: int = 3
    global_sink: bool = True
    name = "longlive"
    by_head = True
    replays_jointly = True

    def __post_init__(self) -> None:
        require_int("chunk_frames", self.chunk_frames, minimum=1)
        require_int("sink_frames", self.sink_frames)
        require_window(self.window_frames, self.sink_frames, self.chunk_frames)

    @property
    def replay_frames(self) -> int:  # type: ignore[override]
        """The window."""
        return self.window_frames

    def attend(self, state: LongLiveState | None, chunk: Chunk) -> Attended:
        """Attend all that is held, except the oldest frames behind the sink where the window is full."""
        state = state or LongLiveState(chunk.tokens[:0], chunk.tokens[:0])
        over = self._hidden(state, chunk)
        state = replace(state, recent=state.recent[over:], full=state.full or over > 0)
        # Behind the eviction only a joint replay is over: as many of its first tokens as the old sink stands for.
        return Attended((state.sink, state.recent), chunk.first_frame, state, self._hidden(state, chunk))

    def remember(self, state: LongLiveState, chunk: Chunk) -> LongLiveState:
        """Fill the sink, then the window."""
        new = chunk.tokens[self._hidden(state, chunk) :]
        free = self.sink_frames * chunk.geometry.tokens_per_frame - len(state.sink)
        return replace(state, sink=state.sink + new[:free], recent=state.recent + new[free:])

    def forget(self, state: LongLiveState, tokens: int) -> LongLiveState:
        """Drop all but a global sink that is older than what is forgotten."""
        if self.global_sink and state.full:  # the sink's frames are not among the last ones, which a replay makes anew
            return replace(state, recent=state.recent[:0])
        sink, recent = shortened((state.sink, state.recent), tokens)  # the sink too, where all of history is made anew
        return LongLiveState(sink, recent)

    def _hidden(self, state: LongLiveState, chunk: Chunk) -> int:
        """Count the tokens beyond the window; of a replay the first, in whose place the sink is attended."""
        held = len(state.sink) + len(state.recent)
        return max(0, held + len(chunk.tokens) - self.window_frames * chunk.geometry.tokens_per_frame)
