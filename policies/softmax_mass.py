"""Attend the archived blocks that would take the most attention (after PackForcing, arXiv 2603.25730, section 5)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvpack.errors import require_int
from kvpack.memory.roles import Candidates, Query, stacked
from kvpack.policies.topk import QueryTopK

#: Blocks that are scored in one product: at 832x480, 256 queries and 182 tokens a block, 36 MB of float32.
_TOGETHER = 16
#: The same on a CPU, 9 MB: memory above 32 MB goes back to the system each time, and is half of the time to get.
_CPU_TOGETHER = 4
#: Blocks of all rows in one attention kernel, which puts out tokens in the place of products: 100 MB in bfloat16, half
#: of what a feed-forward layer takes. The host launches them, and is what a GPU waits for in a chunk's first step.
_FUSED_TOGETHER = 128


@dataclass(frozen=True)
class SoftmaxMassSelector(QueryTopK):
    """Chooses the `topk` blocks with the largest share of attention: log-sum-exp of q . k / sqrt(d) over a block.

    Differs from the paper's sum of q . k: one key that matches well counts, however many others do not. It needs the
    keys themselves: `max_queries` * heads products for each archived token. A block of more tokens takes more
    attention, so that the score isn't divided by their number. Ties go to the later block.

    Args:
        max_queries: most queries that are scored, spread evenly over the chunk.

    Raises:
        InvalidOptionError: if `topk` is negative, or `max_queries` less than 1.
    """

    max_queries: int = 256
    name = "softmax-mass"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("max_queries", self.max_queries, minimum=1)

    def scores(self, query: Query, candidates: Candidates) -> Float[Tensor, "batch blocks"]:
        """Average the logarithm of a block's softmax mass over heads and scored queries."""
        queries = query.rotated() if self.after_rope else query.queries
        # A stride that is rounded up, so that there are no more.
        some = queries[:, :: -(-queries.shape[1] // self.max_queries)]
        fused = _fused_attention(some)
        by_products = _CPU_TOGETHER if some.device.type == "cpu" else _TOGETHER
        most = max(1, _FUSED_TOGETHER // len(some)) if fused else by_products
        if self.after_rope:
            runs = stacked(map(candidates.rotated_keys, range(candidates.count)), most)
        else:
            runs = candidates.together(most)
        masses = [products(some, keys) if fused is None else attended(some, keys, fused) for keys in runs]
        # A mean of logarithms: that of masses would be little but the sharpest head.
        return query.mean_heads(torch.cat(masses, dim=1).mean(dim=(2, 3)))


def products(
    queries: Float[Tensor, "batch queries heads head_dim"], keys: Float[Tensor, "batch blocks tokens heads head_dim"]
) -> Float[Tensor, "batch blocks heads queries"]:
    """Return the logarithm of each block's softmax mass, from all products of queries and keys."""
    scaled = queries.float() / queries.shape[-1] ** 0.5
    return torch.einsum("bihd,bmjhd->bmhij", scaled, keys.float()).logsumexp(dim=4)


def attended(
    queries: Float[Tensor, "batch queries heads head_dim"],
    keys: Float[Tensor, "batch blocks tokens heads head_dim"],
    attention: Callable[..., Any],
) -> Float[Tensor, "batch blocks heads queries"]:
    """Return the same from the log-sum-exp that an attention kernel gives; products are never in memory.

    Args:
        queries: a few of the chunk's.
        keys: of several blocks, each of which is attended by itself.
        attention: called with queries, keys and values; returns its output, and the log-sum-exp of each query.
    """
    blocks = keys.shape[1]
    repeated = queries[:, None].expand(-1, blocks, -1, -1, -1).flatten(0, 1)
    every = repeated.transpose(1, 2)  # (batch * blocks, heads, queries, head_dim)
    each = keys.flatten(0, 1).transpose(1, 2)  # (batch * blocks, heads, tokens, head_dim)
    # Values are in vain: the kernel wants some, and keys are there.
    masses: Tensor = attention(every, each, each)[1]  # (batch * blocks, heads, queries)
    return masses.unflatten(0, (-1, blocks))  # (batch, blocks, heads, queries)


def _fused_attention(queries: Tensor) -> Callable[..., Any] | None:
    """Return torch's flash attention, if it takes these on their device."""
    if not queries.is_cuda or queries.shape[-1] % 8:  # the kernel takes multiples of 8
        return None
    each = queries.transpose(1, 2)
    given = torch.backends.cuda.SDPAParams(each, each, each, None, 0.0, False, False)
    usable = torch.backends.cuda.can_use_flash_attention(given)
    return torch.ops.aten._scaled_dot_product_flash_attention if usable else None
