"""Frames of long ago that look like the last one, beside a short window (LongLive-RAG, arXiv 2606.02553)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory import Attended, Chunk, StateMemory, Tokens


@dataclass(frozen=True, eq=False)
class Searchable:
    """The sink, all other frames that are held, and what each of these looks like.

    Args:
        sink: the first frames.
        held: consecutive frames behind them, at their places in the video.
        first: latent frame of the video that is the first of them.
        looks: a vector for each of them.
    """

    sink: Tokens
    held: Tokens
    first: int
    looks: Float[torch.Tensor, "batch frames channels"]


@dataclass(frozen=True)
class LongLiveRAG(StateMemory):
    """A sink, a few of the last frames, and those of the older ones whose latents are most like those of the last.

    Likeness is the cosine between means of latent frames over their places, for each batch row, and the same in all
    layers. What has left the window is searched, but for its `guard_frames` newest frames. Retrieved frames are
    attended at position 0, all others at their places in a window that moves along.

    Differs from the released code: looks are its `avg_pool`, where its auto-encoder needs weights; and no more than
    `archive_frames` can be searched, where it keeps every frame on the CPU. Without latents, as with keys of the last
    denoising step, all frames are alike, and the newest are retrieved.

    Args:
        chunk_frames: latent frames generated together.
        window_frames: latent frames attended, the retrieved ones and the current chunk included, and their positions.
        sink_frames: first latent frames, which are never dropped.
        retrieved_frames: older frames that are attended.
        guard_frames: frames behind the window that are not searched.
        archive_frames: most frames that can be searched, the oldest are dropped first; 288 MB each at 832x480 in
            Wan2.1-1.3B.

    Raises:
        InvalidOptionError: if a size is wrong, or sink, retrieved frames and the chunk do not fit into the window.
    """

    chunk_frames: int = 3
    window_frames: int = 12
    sink_frames: int = 1
    retrieved_frames: int = 6
    guard_frames: int = 5
    archive_frames: int = 48
    name = "longlive-rag"

    def __post_init__(self) -> None:
        for option in ("chunk_frames", "sink_frames", "retrieved_frames", "archive_frames"):
            require_int(option, getattr(self, option), minimum=1)
        require_int("guard_frames", self.guard_frames)
        if self.window_frames < self.sink_frames + self.retrieved_frames + self.chunk_frames:
            raise InvalidOptionError(
                f"window_frames must be at least sink_frames + retrieved_frames + chunk_frames, {self.sink_frames} + "
                f"{self.retrieved_frames} + {self.chunk_frames}, got {self.window_frames}"
            )

    @property
    def local_frames(self) -> int:
        """Last frames of history that are attended."""
        return self.window_frames - self.sink_frames - self.retrieved_frames - self.chunk_frames

    def attend(self, state: Searchable | None, chunk: Chunk) -> Attended:
        """Attend the sink, what is retrieved, and the last frames."""
        nothing, each, start = chunk.tokens[:0], chunk.geometry.tokens_per_frame, chunk.first_frame
        state = state or Searchable(
            nothing, nothing, self.sink_frames, chunk.queries.new_zeros(len(chunk.queries), 0, 1, dtype=torch.float32)
        )
        # So that the chunk ends where the window does.
        moved = max(0, start - (self.window_frames - self.chunk_frames))
        local = state.held[max(0, len(state.held) - self.local_frames * each) :].moved(-float(moved))
        searched = max(0, start - self.window_frames - self.guard_frames + self.sink_frames - state.first)
        parts = (state.sink, *self._retrieved(state, searched, each), local)
        return Attended(tuple(part for part in parts if len(part)), start - moved, state)

    def remember(self, state: Searchable, chunk: Chunk) -> Searchable:
        """Fill the sink, then append the clean chunk and what it looks like, and drop the oldest frames."""
        each = chunk.geometry.tokens_per_frame
        free = min(self.sink_frames - len(state.sink) // each, chunk.frames)
        looks = _joined(state.looks, _looks(chunk)[:, free:])
        held = state.held + chunk.tokens[free * each :]
        over = max(
            0, looks.shape[1] - (self.window_frames - self.sink_frames + self.guard_frames + self.archive_frames)
        )
        if over:
            # Copies, or what is dropped would stay in memory.
            held, looks = held[over * each :].compact(), looks[:, over:].clone()
        return Searchable(state.sink + chunk.tokens[: free * each], held, state.first + over, looks)

    @property
    def replay_frames(self) -> int:  # type: ignore[override]
        """The whole chunks in the window, beside the current one."""
        return self.window_frames // self.chunk_frames * self.chunk_frames - self.chunk_frames

    def forget(self, state: Searchable, tokens: int) -> Searchable:
        """Drop the last frames, those of the sink too where no other is left."""
        each = len(state.held) // state.looks.shape[1] if state.looks.shape[1] else 0
        own = min(tokens, len(state.held))
        left = len(state.held) - own
        sink = state.sink[: len(state.sink) - (tokens - own)]
        return replace(state, sink=sink, held=state.held[:left], looks=state.looks[:, : left // each if each else 0])

    def _retrieved(self, state: Searchable, searched: int, each: int) -> list[Tokens]:
        """Return the frames, of the first `searched` ones, that are most like the last; nothing if there is none."""
        if not searched:
            return []
        frames = alike(state.looks[:, -1], state.looks[:, :searched], self.retrieved_frames)
        places = torch.arange(each, device=frames.device)
        found = state.held.take((frames[..., None] * each + places).flatten(1))  # [rows, frames * each]
        coordinates = found.coordinates.clone()
        # Position 0, where the sink begins too.
        coordinates[..., 0] = 0.0
        return [replace(found, coordinates=coordinates)]


def alike(
    look: Float[torch.Tensor, "batch channels"], looks: Float[torch.Tensor, "batch frames channels"], most: int
) -> Int[torch.Tensor, "batch found"]:
    """Return the frames whose looks have the largest cosine with one, ascending; the newer of two that are equal."""
    cosines = torch.nn.functional.cosine_similarity(looks, look[:, None], dim=2)
    newest_first = cosines.flip(1).argsort(dim=1, descending=True, stable=True)[:, :most]
    return (looks.shape[1] - 1 - newest_first).sort(dim=1).values


def _joined(looks: torch.Tensor, more: torch.Tensor) -> Float[torch.Tensor, "batch frames channels"]:
    """Return vectors one behind the other; those of frames without latents are zero."""
    width = max(looks.shape[2], more.shape[2])
    return torch.cat([torch.nn.functional.pad(each, (0, width - each.shape[2])) for each in (looks, more)], dim=1)


def _looks(chunk: Chunk) -> Float[torch.Tensor, "batch frames channels"]:
    if chunk.latents is None:
        return chunk.queries.new_zeros(len(chunk.queries), chunk.frames, 1, dtype=torch.float32)
    # Beside this layer, which may be on another device than the model's first.
    return chunk.latents.float().mean(dim=(3, 4)).transpose(1, 2).to(chunk.queries.device)
