"""The cleaner a chunk gets, the fewer chunks before it are attended (MAGI-1, arXiv 2505.13211)."""

from dataclasses import dataclass

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory import Attended, Chunk, StateMemory, Tokens


@dataclass(frozen=True)
class Magi(StateMemory):
    """A window whose length depends on the denoising step, at the positions in the video.

    Differs from the released code: chunks are generated one after the other, so that all before one are clean; a window
    is told for each step, where the released one holds for a quarter of the steps; and it counts chunks of history,
    where the released 5, 4, 3, 2 and 1 count the chunk itself, which are (4, 3, 2, 1) and 0 here.

    Args:
        chunk_frames: latent frames generated together.
        previous_chunks: chunks of history attended at each denoising step; the last also at all steps after it.
        clean_chunks: chunks of history attended in the forward of the clean chunk.

    Raises:
        InvalidOptionError: if there is no window, or one is negative.
    """

    chunk_frames: int = 3
    previous_chunks: tuple[int, ...] | list[int] = (5, 4, 3, 2)
    clean_chunks: int = 1
    name = "magi"
    by_head = True
    every_step = True

    def __post_init__(self) -> None:
        require_int("chunk_frames", self.chunk_frames, minimum=1)
        require_int("clean_chunks", self.clean_chunks)
        if not isinstance(self.previous_chunks, tuple | list) or not self.previous_chunks:
            raise InvalidOptionError(
                f"previous_chunks must be a number for each step, as (5, 4, 3, 2), got {self.previous_chunks!r}"
            )
        for step, chunks in enumerate(self.previous_chunks):
            require_int(f"previous_chunks[{step}]", chunks)
        object.__setattr__(self, "previous_chunks", tuple(self.previous_chunks))  # a list, where it comes from JSON

    def window(self, step: int) -> int:
        """Return the chunks of history attended at a step.

        >>> [Magi().window(step) for step in (0, 1, 2, 3, 4, -1)]
        [5, 4, 3, 2, 2, 1]
        """
        return self.clean_chunks if step < 0 else self.previous_chunks[min(step, len(self.previous_chunks) - 1)]

    def attend(self, state: Tokens | None, chunk: Chunk) -> Attended:
        """Attend as many of the last chunks as the step's window holds."""
        held = state or chunk.tokens[:0]
        return Attended((self._last(held, self.window(chunk.step), chunk),), chunk.first_frame, held)

    def remember(self, state: Tokens, chunk: Chunk) -> Tokens:
        """Append the clean chunk, and drop what no step will attend."""
        # The longest window of any step.
        return self._last(state + chunk.tokens, self.replay_frames // self.chunk_frames, chunk)

    @property
    def replay_frames(self) -> int:  # type: ignore[override]
        """All that is held."""
        return max(*self.previous_chunks, self.clean_chunks) * self.chunk_frames

    def forget(self, state: Tokens, tokens: int) -> Tokens:
        """Drop the last tokens; what has left the longest window does not come back."""
        return state[: len(state) - tokens]

    def _last(self, tokens: Tokens, chunks: int, chunk: Chunk) -> Tokens:
        count = chunks * self.chunk_frames * chunk.geometry.tokens_per_frame
        return tokens[max(0, len(tokens) - count) :]
