"""A window that only ever holds the first frames again, to and fro (Rolling Sink, arXiv 2602.07775): no training."""

from dataclasses import dataclass, replace

import torch

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory import Attended, Chunk, StateMemory, Tokens


@dataclass(frozen=True, eq=False)
class RollingState:
    """The window as it is attended, and the first window as it was."""

    window: Tokens
    first: Tokens


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

    def __post_init__(self) -> None:
        require_int("chunk_frames", self.chunk_frames, minimum=1)
        if self.window_frames % self.chunk_frames or self.window_frames < 3 * self.chunk_frames:
            raise InvalidOptionError(
                f"window_frames must be a multiple of chunk_frames, {self.chunk_frames}, and at least three of them, "
                f"got {self.window_frames}"
            )

    def attend(self, state: RollingState | None, chunk: Chunk) -> Attended:
        """Attend the window, without its oldest chunk if it is full."""
        state = state or RollingState(chunk.tokens[:0], chunk.tokens[:0])
        over = len(state.window) + len(chunk.tokens) - self.window_frames * chunk.geometry.tokens_per_frame
        window = state.window[max(0, over) :]
        return Attended((window,), chunk.first_frame, replace(state, window=window))

    def remember(self, state: RollingState, chunk: Chunk) -> RollingState:
        """Append the clean chunk, and replace the one that was newest by one of the first window's."""
        each, window, first = chunk.geometry.tokens_per_frame, state.window, state.first
        if len(first) < self.window_frames * each:
            first = first + chunk.tokens
        if chunk.first_frame >= self.window_frames:
            window = window[: -len(chunk.tokens)] + self._replacement(window[-len(chunk.tokens) :], first, each)
        return RollingState(window + chunk.tokens, first)

    @property
    def replay_frames(self) -> int:  # type: ignore[override]
        """The newest chunk, the only true one."""
        return self.chunk_frames

    def forget(self, state: RollingState, tokens: int) -> RollingState:
        """Drop the newest chunk, in the first window too if that is not full."""
        left = state.window[: len(state.window) - tokens]
        begins = bool(state.window.coordinates[0, 0, 0] == 0)  # nothing has been dropped yet
        return RollingState(left, left if begins else state.first)

    def _replacement(self, newest: Tokens, first: Tokens, each: int) -> Tokens:
        frames = self.source(int(newest.coordinates[0, 0, 0]))
        device = first.keys.device
        index = torch.cat([torch.arange(frame * each, (frame + 1) * each, device=device) for frame in frames])
        return replace(newest, keys=first.keys[:, index], values=first.values[:, index])

    def source(self, first_frame: int) -> list[int]:
        """Return the frames of the first window that replace a chunk from `first_frame` on.

        >>> memory = RollingSink(chunk_frames=3, window_frames=9)
        >>> [memory.source(frame) for frame in (6, 9, 12, 15)]
        [[5, 4, 3], [2, 1, 0], [0, 1, 2], [3, 4, 5]]
        """
        walked = self.window_frames - self.chunk_frames
        way, place = divmod(first_frame, walked)
        frames = range(place, place + self.chunk_frames)
        return [walked - 1 - frame for frame in frames] if way % 2 else list(frames)
