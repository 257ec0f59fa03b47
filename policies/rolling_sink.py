"""A window that only ever holds the first frames again, to and fro (Rolling Sink, arXiv 2602.07775): no training."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory import Attended, Chunk, StateMemory, Tokens


@dataclass(frozen=True, eq=False)
class RollingState:
    """The window in host integers, and the tokens that it shows.

    Args:
        each: tokens of a frame.
        first: tokens of the first frames, which are shown again.
        recent: tokens of other frames that are shown.
        frames: which frames these are.
        window: position of each frame of history, and the frame of the video that is shown there.
    """

    each: int
    first: Tokens
    recent: Tokens
    frames: tuple[int, ...] = ()
    window: tuple[tuple[int, int], ...] = ()

    def shown(self) -> "RollingState":
        """Return the state without recent tokens that the window does not show any more."""
        sources = {source for _, source in self.window}
        kept = [index for index, frame in enumerate(self.frames) if frame in sources]
        if len(kept) == len(self.frames):
            return self
        recent = self.recent[:0].compact()
        for index in kept:
            recent = recent + self.recent[index * self.each : (index + 1) * self.each]
        return replace(self, recent=recent, frames=tuple(self.frames[index] for index in kept))

    def with_recent(self, tokens: Tokens, frames: range) -> "RollingState":
        """Return the state with more recent frames."""
        return replace(self, recent=self.recent + tokens, frames=(*self.frames, *frames)) if frames else self


@dataclass(frozen=True)
class RollingSink(StateMemory):
    """Each chunk behind the window's length, once the next one is there, is replaced by one of the first window's.

    Replacements walk through the first `window_frames - chunk_frames` frames forward, then backward with their frames
    in reverse order, and so on, at the true positions of what they replace. The newest chunk is always the true one.
    So history never shows what the model had not seen in training, however long the video.

    Args:
        chunk_frames: latent frames generated together.
        window_frames: latent frames attended, the current chunk included; the length that the model was trained with.

    Raises:
        InvalidOptionError: if the window is not a multiple of the chunk, or shorter than three.
    """

    chunk_frames: int = 3
    window_frames: int = 21
    name = "rolling-sink"
    by_head = True

    def __post_init__(self) -> None:
        require_int("chunk_frames", self.chunk_frames, minimum=1)
        if self.window_frames % self.chunk_frames or self.window_frames < 3 * self.chunk_frames:
            raise InvalidOptionError(
                f"window_frames must be a multiple of chunk_frames, {self.chunk_frames}, and at least three of them, "
                f"got {self.window_frames}"
            )

    @property
    def walked(self) -> int:
        """Frames of the first window that are shown again."""
        return self.window_frames - self.chunk_frames

    def attend(self, state: RollingState | None, chunk: Chunk) -> Attended:
        """Return the window without its oldest frames, if it is full."""
        nothing = chunk.tokens[:0].compact()  # a view would keep the chunk alive
        state = state or RollingState(chunk.geometry.tokens_per_frame, nothing, nothing)
        over = max(0, len(state.window) + chunk.frames - self.window_frames)
        state = replace(state, window=state.window[over:]).shown()
        return Attended(tuple(self._runs(state)), chunk.first_frame, state)

    def remember(self, state: RollingState, chunk: Chunk) -> RollingState:
        """Return the clean chunk behind the window, and what was newest replaced."""
        window, start, count = state.window, chunk.first_frame, chunk.frames
        if start >= self.window_frames:
            # Places stay: what is shown there is what changes, so that distances are those of training.
            newest = [place for place, _ in window[-count:]]
            window = (*window[:-count], *zip(newest, self.source(newest[0]), strict=False))
        free = max(0, min(count, self.walked - start))  # the chunk's frames that the walk will show
        return replace(
            replace(state, window=window).shown(),
            window=(*window, *((frame, frame) for frame in range(start, start + count))),
            first=state.first + chunk.tokens[: free * state.each] if free else state.first,
        ).with_recent(chunk.tokens[free * state.each :], range(start + free, start + count))

    @property
    def replay_frames(self) -> int:  # type: ignore[override]
        """The newest chunk, the only true one."""
        return self.chunk_frames

    def forget(self, state: RollingState, tokens: int) -> RollingState:
        """Return the window without the newest chunk, in the first window too if that is not full."""
        count = tokens // state.each
        own = min(count, len(state.frames))  # the newest frames are recent, or still the last of the first
        recent = state.recent[: len(state.recent) - own * state.each]
        first = state.first[: len(state.first) - (count - own) * state.each]
        return RollingState(state.each, first, recent, state.frames[: len(state.frames) - own], state.window[:-count])

    def _runs(self, state: RollingState) -> Iterator[Tokens]:
        """Yield the window's tokens, consecutive frames in one."""
        runs: list[list[int]] = []  # shift, index of the first frame among the first or recent ones, frames
        for place, source in state.window:
            index = source if source < self.walked else self.walked + state.frames.index(source)
            # As few pieces as can be, each a slice; none over the first frames and recent ones, which lie apart.
            if runs and index != self.walked and [runs[-1][0], runs[-1][1] + runs[-1][2]] == [place - source, index]:
                runs[-1][2] += 1
            else:
                runs.append([place - source, index, 1])
        for shift, index, count in runs:
            held, start = (state.first, index) if index < self.walked else (state.recent, index - self.walked)
            tokens = held[start * state.each : (start + count) * state.each]
            yield tokens.moved(float(shift))

    def source(self, first_frame: int) -> list[int]:
        """Frames of the first window that stand where a chunk from `first_frame` on was.

        >>> memory = RollingSink(chunk_frames=3, window_frames=9)
        >>> [memory.source(frame) for frame in (6, 9, 12, 15)]
        [[5, 4, 3], [2, 1, 0], [0, 1, 2], [3, 4, 5]]
        """
        walked = self.walked
        way, place = divmod(first_frame, walked)  # odd ways lead back
        # Behind a first chunk that is shorter, a chunk would reach beyond where the walk turns.
        frames = [min(frame, walked - 1) for frame in range(place, place + self.chunk_frames)]
        return [walked - 1 - frame for frame in frames] if way % 2 else frames
