"""Deep sink and participative compression (Deep Forcing, arXiv 2512.05081, section 4): token by token, no training."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory import Attended, Chunk, StateMemory, Tokens
from kvpack.memory.roles import as_indices
from kvpack.policies.window import require_window


@dataclass(frozen=True, eq=False)
class DeepState:
    """What is held, at its true places; how far the sink has moved; how often each token was chosen; last queries.

    Of queries, rotated, the sum over each frame is all that scores need.
    """

    tokens: Tokens
    shift: float
    chosen: Int[Tensor, "batch tokens"]
    queries: Float[Tensor, "batch recent_frames heads head_dim"]


@dataclass(frozen=True)
class DeepForcing(StateMemory):
    """A window whose sink moves along in time and, when it is full, keeps the tokens that recent queries attend most.

    A chunk that would overfill the window keeps the sink, the last `recent_frames` with the chunk itself, and of what
    is between the tokens with the largest sums of q . k over the last queries and all heads, to `budget_frames` in all.
    What goes is gone. As in the released code, the sink is moved to end one chunk before a gapless place, and a token
    chosen `most_chosen` times is not chosen again.

    Differs from the released code: keys are kept before RoPE, so that moving the sink adds no rounding.

    Args:
        chunk_frames: latent frames generated together.
        window_frames: latent frames attended at most, the current chunk included.
        sink_frames: first latent frames that are never dropped.
        budget_frames: latent frames' worth of tokens after a compression, the chunk included; 0 evicts the oldest
            instead, which is the deep sink alone.
        recent_frames: last latent frames, the chunk included, that are kept whole and whose queries score.
        most_chosen: compressions that a token can outlast.

    Raises:
        InvalidOptionError: if the sizes do not fit into each other.
    """

    chunk_frames: int = 3
    window_frames: int = 21
    sink_frames: int = 10
    budget_frames: int = 16
    recent_frames: int = 4
    most_chosen: int = 7
    name = "deep-forcing"
    by_head = True
    needs_queries = True

    def __post_init__(self) -> None:
        for option in ("chunk_frames", "window_frames", "recent_frames", "most_chosen"):
            require_int(option, getattr(self, option), minimum=1)
        for option in ("sink_frames", "budget_frames"):
            require_int(option, getattr(self, option))
        if self.recent_frames < self.chunk_frames:
            raise InvalidOptionError(
                f"recent_frames must be at least chunk_frames, {self.chunk_frames}, got {self.recent_frames}"
            )
        least = self.sink_frames + self.recent_frames
        require_window(self.window_frames, self.sink_frames, self.chunk_frames)
        if self.budget_frames and not least <= self.budget_frames <= self.window_frames:
            raise InvalidOptionError(
                f"budget_frames must be 0, or {least} (sink and recent frames) to {self.window_frames} (the window), "
                f"got {self.budget_frames}"
            )

    def attend(self, state: DeepState | None, chunk: Chunk) -> Attended:
        """Attend everything held, after eviction or compression where the window is full."""
        state = state or self._empty(chunk)
        each = chunk.geometry.tokens_per_frame
        if len(state.tokens) + len(chunk.tokens) > self.window_frames * each:
            state = self._compressed(state, chunk) if self.budget_frames else self._evicted(state, chunk)
            # Gapless would be without the chunk's own tokens; see the class.
            shift = chunk.first_frame - (len(state.tokens) + len(chunk.tokens)) // each
            state = replace(state, shift=float(shift))
        sink = self.sink_frames * each
        return Attended((state.tokens[:sink].moved(state.shift), state.tokens[sink:]), chunk.first_frame, state)

    def remember(self, state: DeepState, chunk: Chunk) -> DeepState:
        """Append the clean chunk, and keep the queries of its last forwards."""
        new = state.chosen.new_zeros(state.chosen.shape[0], len(chunk.tokens))
        return replace(
            state,
            tokens=state.tokens + chunk.tokens,
            chosen=torch.cat([state.chosen, new], dim=1),
            queries=self._last_queries(state, chunk),
        )

    @property
    def replay_frames(self) -> int:  # type: ignore[override]
        """The whole chunks among the recent frames."""
        return self.recent_frames // self.chunk_frames * self.chunk_frames

    def forget(self, state: DeepState, tokens: int) -> DeepState:
        """Drop the last tokens; the last queries stay."""
        held = len(state.tokens) - tokens
        return replace(state, tokens=state.tokens[:held], chosen=state.chosen[:, :held])

    def _empty(self, chunk: Chunk) -> DeepState:
        nothing = chunk.queries[:, :0]
        return DeepState(chunk.tokens[:0], 0.0, nothing[..., 0, 0].long(), nothing.float())

    def _last_queries(self, state: DeepState, chunk: Chunk) -> Tensor:
        """Return sums of rotated queries over each of the last `recent_frames` frames of all forwards, this one too."""
        each = chunk.geometry.tokens_per_frame
        rotated = (chunk.rotated(queries).float() for queries in (*chunk.earlier, chunk.queries))
        sums = (queries.unflatten(1, (-1, each)).sum(dim=2) for queries in rotated)  # (batch, frames, heads, head_dim)
        # A copy, for a view would keep what is cut off alive.
        return torch.cat([state.queries, *sums], dim=1)[:, -self.recent_frames :].clone()

    def _evicted(self, state: DeepState, chunk: Chunk) -> DeepState:
        """Drop the oldest tokens behind the sink."""
        each = chunk.geometry.tokens_per_frame
        sink, over = self.sink_frames * each, len(state.tokens) + len(chunk.tokens) - self.window_frames * each
        chosen = torch.cat([state.chosen[:, :sink], state.chosen[:, sink + over :]], dim=1)
        return replace(state, tokens=state.tokens[:sink] + state.tokens[sink + over :], chosen=chosen)

    def _compressed(self, state: DeepState, chunk: Chunk) -> DeepState:
        """Keep sink, chosen tokens and recent ones; the chunk's own are counted, but not held yet."""
        each, held = chunk.geometry.tokens_per_frame, len(state.tokens)
        sink = self.sink_frames * each
        recent = held + len(chunk.tokens) - self.recent_frames * each  # index of the first recent token
        # At their places in the video, as the queries.
        keys = state.tokens[sink:recent].rotated_keys(chunk.geometry).float()
        queries = self._last_queries(state, chunk).sum(dim=1)  # the sum of q . k over queries is that of their sum
        # Neither softmax nor scale, as in Algorithm 1: only their order counts.
        scores = chunk.sum_heads(torch.einsum("bhd,bnhd->bn", queries, keys))
        scores = scores.masked_fill(state.chosen[:, sink:recent] >= self.most_chosen, -torch.inf)
        top = scores.topk((self.budget_frames - self.sink_frames - self.recent_frames) * each, dim=1).indices + sink
        counts = state.chosen.scatter_add(1, top, torch.ones_like(top))

        first, last = (as_indices(each, len(top), top.device) for each in (range(sink), range(recent, held)))
        # In the order of time, so that the sink stays in front, where slices find it.
        kept = torch.cat([first, top.sort(dim=1).values, last], dim=1)
        # Their places stay: a chosen token is attended where it was.
        return replace(state, tokens=state.tokens.take(kept), chosen=counts.gather(1, kept))
