"""Each head keeps the tokens that have taken most attention so far, and the recent ones (H2O, arXiv 2306.14048)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory import Attended, Chunk, StateMemory, Tokens


@dataclass(frozen=True, eq=False)
class HitterState:
    """Held tokens, at their places in the video, and the attention that each has received."""

    tokens: Tokens
    masses: Float[torch.Tensor, "batch tokens heads"]


@dataclass(frozen=True)
class HeavyHitters(StateMemory):
    """Over the budget, each head keeps the last frames and, of the tokens before them, those most attended so far.

    Attention adds up: the mean softmax of each clean chunk's queries, `max_queries` of them (all in released code).

    Args:
        chunk_frames: latent frames generated together.
        budget_frames: latent frames' worth of tokens that each head keeps of history.
        recent_frames: last latent frames among them, whole.
        max_queries: most queries of a chunk whose attention counts.

    Raises:
        InvalidOptionError: if a size is not positive, or the recent frames do not fit into the budget.
    """

    chunk_frames: int = 3
    budget_frames: int = 18
    recent_frames: int = 6
    max_queries: int = 256
    name = "h2o"
    by_head = True

    def __post_init__(self) -> None:
        for option in ("chunk_frames", "budget_frames", "recent_frames", "max_queries"):
            require_int(option, getattr(self, option), minimum=1)
        if self.recent_frames > self.budget_frames:
            raise InvalidOptionError(f"recent_frames must be <= budget {self.budget_frames}, got {self.recent_frames}")

    def attend(self, state: HitterState | None, chunk: Chunk) -> Attended:
        """Attend everything held."""
        state = state or HitterState(chunk.tokens[:0], chunk.queries[:, :0, :, 0].float())
        return Attended((state.tokens,), chunk.first_frame, state)

    def remember(self, state: HitterState, chunk: Chunk) -> HitterState:
        """Append the clean chunk, and let each head keep its own tokens of both."""
        each, tokens = chunk.geometry.tokens_per_frame, state.tokens + chunk.tokens
        masses = attention(chunk.rotated(chunk.queries), tokens.rotated_keys(chunk.geometry), self.max_queries)
        masses[:, : len(state.tokens)] += state.masses  # no decay, as in the paper
        if len(tokens) <= self.budget_frames * each:
            return HitterState(tokens, masses)
        recent = self.recent_frames * each
        # The recent frames outrank all others, so that topk always keeps them.
        ranks = torch.nn.functional.pad(masses[:, :-recent], (0, 0, 0, recent), value=torch.inf)
        # In time order, which `forget` goes by.
        kept = ranks.topk(self.budget_frames * each, dim=1).indices.sort(dim=1).values
        return HitterState(tokens.take(kept), masses.gather(1, kept))

    @property
    def replay_frames(self) -> int:  # type: ignore[override]
        """The whole chunks among the recent frames."""
        return self.recent_frames // self.chunk_frames * self.chunk_frames

    def forget(self, state: HitterState, tokens: int) -> HitterState:
        """Drop the last tokens; the attention that they gave to others stays."""
        left = len(state.tokens) - tokens
        return HitterState(state.tokens[:left], state.masses[:, :left])


def attention(queries: torch.Tensor, keys: torch.Tensor, most: int) -> Float[torch.Tensor, "batch tokens heads"]:
    """Average the attention that each key receives, over at most `most` evenly spread queries, in float32."""
    some, wide = queries[:, :: -(-queries.shape[1] // most)].float() / keys.shape[-1] ** 0.5, keys.float()
    # 64 queries at a time: with all of them the products would be larger than history.
    blocks = (torch.einsum("bihd,bjhd->bijh", part, wide).softmax(dim=2).sum(dim=1) for part in some.split(64, dim=1))
    return sum(blocks, torch.zeros_like(wide[..., 0])) / some.shape[1]
