"""Each head keeps the tokens that are attended and not redundant (R1KV of FlowCache, arXiv 2602.10825)."""

from dataclasses import dataclass

import torch
from torch.nn.functional import max_pool1d, normalize

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory import Attended, Chunk, StateMemory, Tokens
from kvpack.policies.h2o import attention

_POOLED = 7  # neighbouring tokens, so that what is around an attended one stays with it


@dataclass(frozen=True)
class FlowCache(StateMemory):
    """When clean history is over the budget, each head keeps of it the tokens with the best scores for a new chunk.

    A score is mix * attention - (1 - mix) * redundancy. Attention is the mean softmax over history of the chunk's
    first queries, then the largest of 7 neighbouring tokens. Redundancy is the softmax over history of a token's mean
    cosine similarity to the other keys. Keys and queries are at their places in the video. What goes is gone.

    Differs from the released code: at most `max_queries` queries count, spread evenly; and scores are in float32. Its
    reuse of features between steps is not there.

    Args:
        chunk_frames: latent frames generated together.
        budget_frames: latent frames' worth of tokens that each head keeps of history.
        mix: weight of attention, lambda in the paper.
        max_queries: most queries that are scored.

    Raises:
        InvalidOptionError: if a size is not positive or `mix` is not in 0..1.
    """

    chunk_frames: int = 3
    budget_frames: int = 18
    mix: float = 0.07
    max_queries: int = 256
    name = "flowcache"
    by_head = True

    def __post_init__(self) -> None:
        for option in ("chunk_frames", "budget_frames", "max_queries"):
            require_int(option, getattr(self, option), minimum=1)
        if not 0 <= self.mix <= 1:
            raise InvalidOptionError(f"mix must be a share >= 0 and <= 1, got {self.mix}")

    def attend(self, state: Tokens | None, chunk: Chunk) -> Attended:
        """Attend what is held, compressed if it is over the budget."""
        held = state or chunk.tokens[:0]
        budget = self.budget_frames * chunk.geometry.tokens_per_frame
        if len(held) > budget:
            # Sorted, so that time order stays, by which `forget` drops the newest.
            held = held.take(self._scores(held, chunk).topk(budget, dim=1).indices.sort(dim=1).values)
        return Attended((held,), chunk.first_frame, held)

    def remember(self, state: Tokens, chunk: Chunk) -> Tokens:
        """Append the clean chunk."""
        return state + chunk.tokens

    @property
    def replay_frames(self) -> int:  # type: ignore[override]
        """The newest chunk, which no head has chosen from yet."""
        return self.chunk_frames

    def forget(self, state: Tokens, tokens: int) -> Tokens:
        """Drop the last tokens."""
        return state[: len(state) - tokens]

    def _scores(self, tokens: Tokens, chunk: Chunk) -> torch.Tensor:
        keys = tokens.rotated_keys(chunk.geometry)
        attended = attention(chunk.rotated(chunk.queries), keys, self.max_queries).transpose(1, 2)
        pooled = max_pool1d(attended, _POOLED, stride=1, padding=_POOLED // 2).transpose(1, 2)
        unit = normalize(keys.float(), dim=-1)
        # A mean of cosines is one product with the sum of all; less its own, which is 1.
        alike = ((unit * unit.sum(dim=1, keepdim=True)).sum(dim=-1) - 1) / (len(tokens) - 1)
        # R1KV's score; at lambda = 0.07 redundancy weighs most.
        return self.mix * pooled - (1 - self.mix) * alike.softmax(dim=1)
