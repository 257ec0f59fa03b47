"""What leaves the window goes on in two running averages, slow and fast (MemRoPE, arXiv 2603.12513)."""

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory import Attended, Chunk, StateMemory, Tokens, consecutive, shortened
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.rope import wide_dtype


@dataclass(frozen=True, eq=False)
class Average:
    """A frame of averaged keys and values, in float32 whatever the model's dtype."""

    keys: Float[Tensor, "batch frame heads head_dim"]
    values: Float[Tensor, "batch frame heads head_dim"]

    def toward(self, other: "Average", rate: float) -> "Average":
        """Move by `rate` of the way to another average."""
        return Average(self.keys.lerp(other.keys, rate), self.values.lerp(other.values, rate))


@dataclass(frozen=True, eq=False)
class MemRoPEState:
    """Sink and recent tokens at their true places, and the two averages once anything has left the window."""

    sink: Tokens
    recent: Tokens
    slow: Average | None = None
    fast: Average | None = None


@dataclass(frozen=True)
class MemRoPE(StateMemory):
    """Sink, slow average, fast average and recent frames at consecutive positions; nothing grows.

    The mean over the frames that leave `recent_frames` moves both averages, which stand for a latent frame each.

    Differs from the released code: averages are kept in float32, where a bfloat16 one would lose every update smaller
    than half of its last bit; and means are by place in the frame, where the released default spreads one mean over
    the frame (`per_position=False`). Its motion-adaptive rate is not there.

    Args:
        chunk_frames: latent frames generated together.
        sink_frames: first latent frames, whole.
        recent_frames: last latent frames, whole.
        slow: share of what leaves in the slow average.
        fast: share of what leaves in the fast average.
        per_position: whether means are by place in the frame.

    Raises:
        InvalidOptionError: if a size is not positive or a share is not in 0..1.
    """

    chunk_frames: int = 3
    sink_frames: int = 3
    recent_frames: int = 4
    slow: float = 0.01
    fast: float = 0.1
    per_position: bool = True
    name = "memrope"
    by_head = True

    def __post_init__(self) -> None:
        for option in ("chunk_frames", "recent_frames"):
            require_int(option, getattr(self, option), minimum=1)
        require_int("sink_frames", self.sink_frames)
        for option in ("slow", "fast"):
            if not 0 < getattr(self, option) <= 1:
                raise InvalidOptionError(f"{option} must be a share > 0 and <= 1, got {getattr(self, option)}")

    def attend(self, state: MemRoPEState | None, chunk: Chunk) -> Attended:
        """Attend all parts without gaps from 0, the chunk right behind them."""
        state = state or MemRoPEState(chunk.tokens[:0], chunk.tokens[:0])
        averages = [self._frame(each, chunk) for each in (state.slow, state.fast) if each is not None]
        parts, each = [state.sink, *averages, state.recent], chunk.geometry.tokens_per_frame
        placed, start = consecutive(parts, frame_tokens=each)
        return Attended(tuple(placed), start, state)

    def remember(self, state: MemRoPEState, chunk: Chunk) -> MemRoPEState:
        """Fill the sink, then the recent frames, then move the averages by what leaves them."""
        each = chunk.geometry.tokens_per_frame
        free = self.sink_frames * each - len(state.sink)
        recent = state.recent + chunk.tokens[free:]
        over = max(0, len(recent) - self.recent_frames * each)
        state = replace(
            state, sink=state.sink + chunk.tokens[:free], recent=recent[over:].compact() if over else recent
        )
        if not over:
            return state
        mean = self._mean(recent[:over], each)
        return replace(
            state,
            # Both begin with the first mean: from zero the slow one would take a hundred chunks.
            slow=mean if state.slow is None else state.slow.toward(mean, self.slow),
            fast=mean if state.fast is None else state.fast.toward(mean, self.fast),
        )

    @property
    def replay_frames(self) -> int:  # type: ignore[override]
        """The whole chunks among the recent frames."""
        return self.recent_frames // self.chunk_frames * self.chunk_frames

    def forget(self, state: MemRoPEState, tokens: int) -> MemRoPEState:
        """Drop the last tokens; what has moved the averages stays in them."""
        sink, recent = shortened((state.sink, state.recent), tokens)
        return replace(state, sink=sink, recent=recent)

    def _mean(self, tokens: Tokens, each: int) -> Average:
        def mean(tensor: Tensor) -> Tensor:
            frames = tensor.float().unflatten(1, (-1, each)).mean(dim=1)  # [batch, each, heads, head_dim]
            return frames if self.per_position else frames.mean(dim=1, keepdim=True).expand_as(frames)

        return Average(mean(tokens.keys), mean(tokens.values))

    @staticmethod
    def _frame(average: Average, chunk: Chunk) -> Tokens:
        like, device = chunk.tokens.keys, chunk.tokens.keys.device
        places = grid_coordinates(1, chunk.geometry.grid).to(device, wide_dtype(device))[None]
        # In the model's dtype only where they are read.
        return Tokens(average.keys.to(like), average.values.to(like), places)
