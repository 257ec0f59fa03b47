"""A chunk that jumps is made again without the tokens that it jumped from (TokenTrim, arXiv 2602.00268)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory import Attended, Chunk, StateMemory, Tokens
from kvpack.memory.geometry import Geometry


@dataclass(frozen=True, eq=False)
class TrimState:
    """The window, the last chunk's mean latent at each place, and the statistics of severities so far."""

    grid: tuple[int, int]
    window: Tokens | None = None
    summary: Float[Tensor, "batch channels places"] | None = None
    count: int = 0
    mean: Float[Tensor, " batch"] | float = 0.0
    squares: Float[Tensor, " batch"] | float = 0.0
    unstable: Int[Tensor, "batch unstable"] | None = None


@dataclass(frozen=True)
class TokenTrim(StateMemory):
    """A rolling window at true positions; where latents jump, a chunk is made again without the places that drift most.

    A chunk's mean latent at each place of the grid is compared with the last chunk's. The severity is the mean distance
    over the `share` of places with the largest; above `deviations` standard deviations over the mean of the severities
    so far, the chunk is generated again from the same noise, without the window's tokens at these places. Rows of a
    batch are vetoed each on its own.

    No code is public; the paper's thresholds are not in what could be read, and these are kvpack's.

    Args:
        chunk_frames: latent frames generated together.
        window_frames: latent frames attended, the current chunk included.
        share: of the places, those that drift most.
        deviations: standard deviations over the mean that are accepted.
        max_retries: most times that a chunk is made again.

    Raises:
        InvalidOptionError: if the window has no room for history, or a share is not in 0..1.
    """

    chunk_frames: int = 3
    window_frames: int = 9
    share: float = 0.1
    deviations: float = 2.0
    max_retries: int = 1  # type: ignore[misc]
    name = "token-trim"
    by_head = True
    warm = 3  # severities that a deviation needs

    def __post_init__(self) -> None:
        require_int("chunk_frames", self.chunk_frames, minimum=1)
        require_int("max_retries", self.max_retries)
        if self.window_frames < 2 * self.chunk_frames:
            raise InvalidOptionError(
                f"window_frames must be at least two chunks, {2 * self.chunk_frames}, got {self.window_frames}"
            )
        if not 0 < self.share < 1:
            raise InvalidOptionError(f"share must be a share > 0 and < 1, got {self.share}")

    @property
    def replay_frames(self) -> int:  # type: ignore[override]
        """The window beside the coming chunk."""
        return (self.window_frames // self.chunk_frames - 1) * self.chunk_frames

    def start(self, geometry: Geometry, layer: int) -> TrimState:
        """Return an empty window."""
        return TrimState(geometry.grid)

    def attend(self, state: TrimState, chunk: Chunk) -> Attended:
        """Attend the window, without the unstable places in a second try."""
        held = chunk.tokens[:0] if state.window is None else state.window
        over = len(held) + len(chunk.tokens) - self.window_frames * chunk.geometry.tokens_per_frame
        held = held[max(0, over) :]
        state = replace(state, window=held)
        return Attended((held if state.unstable is None else self._trimmed(held, state),), chunk.first_frame, state)

    def remember(self, state: TrimState, chunk: Chunk) -> TrimState:
        """Append the chunk, and add its severity to the statistics."""
        assert state.window is not None
        state = replace(state, window=state.window + chunk.tokens)
        if chunk.latents is None:
            return state
        summary = self._summary(state, chunk.latents)
        if state.summary is None:  # the first chunk has nothing to jump from
            return replace(state, summary=summary)
        if chunk.index <= state.count:
            return state  # a replay
        severity, _ = self._severity(state.summary, summary)
        count, away = state.count + 1, severity - state.mean
        mean = state.mean + away / count
        # Welford's running sums, which need no severity of before.
        return replace(state, summary=summary, count=count, mean=mean, squares=state.squares + away * (severity - mean))

    def forget(self, state: TrimState, tokens: int) -> TrimState:
        """Drop the window's last tokens."""
        return state if state.window is None else replace(state, window=state.window[: len(state.window) - tokens])

    def veto(self, state: TrimState, latents: Tensor) -> tuple[Bool[Tensor, " batch"], TrimState]:
        """Return the rows whose severity stands out, and the places to leave out."""
        if state.summary is None or state.count < self.warm:
            return torch.zeros(latents.shape[0], dtype=torch.bool, device=latents.device), state
        severity, places = self._severity(state.summary, self._summary(state, latents))
        deviation = (torch.as_tensor(state.squares) / state.count) ** 0.5
        return severity > state.mean + self.deviations * deviation, replace(state, unstable=places)

    @staticmethod
    def _summary(state: TrimState, latents: Tensor) -> Tensor:
        return adaptive_avg_pool3d(latents.float(), (1, *state.grid)).flatten(2)  # [rows, channels, places]

    def _severity(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        drift = (after - before).norm(dim=1)  # over channels, at each place
        top = drift.topk(max(1, round(self.share * drift.shape[1])), dim=1)
        return top.values.mean(dim=1), top.indices

    @staticmethod
    def _trimmed(held: Tokens, state: TrimState) -> Tokens:
        assert state.unstable is not None
        places = state.grid[0] * state.grid[1]
        stable = torch.ones(state.unstable.shape[0], places, dtype=torch.bool, device=state.unstable.device)
        # The same places in every frame.
        stable = stable.scatter(1, state.unstable, False).repeat(1, len(held) // places)
        # As many places are left in every row.
        index = stable.nonzero()[:, 1].view(stable.shape[0], -1)  # [rows, left]
        return held.take(index.to(held.keys.device))
