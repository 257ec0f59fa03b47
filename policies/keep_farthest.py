"""Keep tokens whose keys are as unlike each other as can be: greedy k-centre (Gonzalez, 1985; cf. arXiv 1708.00489)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from kvpack.errors import require_int
from kvpack.memory.blocks import KVBlock
from kvpack.policies.keep import KeepCompressor


@dataclass(frozen=True)
class FarthestCompressor(KeepCompressor):
    """Keeps the token least like the mean, then again and again the one that is least like all kept ones.

    Likeness is the cosine of keys before RoPE, all heads joined. So everything that a block shows stays in it, be it
    ever so small, and nothing twice.

    With more tokens to keep than `rounds`, a round takes several at once: the least like the kept ones, of each place
    in the frame one before any has two. The block is read once a round, however many tokens are kept.

    Args:
        rounds: most passes over a block; as many as tokens are kept is the exact greedy choice.

    Raises:
        InvalidOptionError: if `rounds` is less than 2.
    """

    rounds: int = field(default=16, kw_only=True)
    name = "keep-farthest"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("rounds", self.rounds, minimum=2)

    def choose(self, block: KVBlock, grid: tuple[int, int], count: int) -> Int[Tensor, "batch kept"]:
        """Choose by the keys alone."""
        return farthest(joined_heads(block.keys), grid[0] * grid[1], count, self.rounds)

    def compress_all(self, blocks: Sequence[KVBlock], grid: tuple[int, int]) -> list[KVBlock]:
        """Choose for a few layers at once: a round is a dozen small kernels, for however many rows."""
        own = type(self).choose is FarthestCompressor.choose and type(self).compress is KeepCompressor.compress
        if not own:  # a subclass says otherwise
            return super().compress_all(blocks, grid)
        keys, count = torch.cat([block.keys for block in blocks]), self.count(blocks[0].span.frames, grid)
        return self.at(blocks, grid, farthest(joined_heads(keys), grid[0] * grid[1], count, self.rounds))


def joined_heads(keys: Float[Tensor, "batch tokens heads head_dim"]) -> Float[Tensor, "batch tokens width"]:
    """Return keys of all heads as one vector of length 1, in float32."""
    return normalize(keys.flatten(2).float(), dim=-1)  # [rows, tokens, heads * head_dim]


def farthest(
    unit: Float[Tensor, "batch tokens width"], cells: int, count: int, rounds: int
) -> Int[Tensor, "batch count"]:
    """Return indices of the tokens that greedy k-centre takes, in the order that it takes them.

    Args:
        unit: vectors of length 1, frame by frame.
        cells: tokens of a frame.
        count: how many are taken.
        rounds: most passes over `unit`; with fewer than `count` each takes several.
    """
    nearest = unit @ unit.mean(dim=1)[..., None]  # likeness to the nearest of the kept ones, first to the mean
    nearest, chosen = nearest.squeeze(-1), []
    for index, size in enumerate(round_sizes(count, rounds)):
        framed = nearest.unflatten(1, (-1, cells))  # (batch, frames, cells)
        # All cosines are below 2, so that a place has its second token only after every place had its first.
        later = framed > framed.amin(dim=1, keepdim=True)
        new = framed.add(later, alpha=4).flatten(1).topk(size, dim=1, largest=False).indices
        chosen.append(new)
        centres = unit.gather(1, new[..., None].expand(-1, -1, unit.shape[2]))
        like = (unit @ centres.transpose(1, 2)).amax(dim=2)
        nearest = like if index == 0 else torch.maximum(nearest, like)
        nearest.scatter_(1, new, torch.inf)  # never again, though all were alike
    return torch.cat(chosen, dim=1)


def round_sizes(count: int, rounds: int) -> list[int]:
    """Return how many tokens each round takes: the first one, the others as equal numbers as can be.

    >>> round_sizes(4, 16), round_sizes(10, 4)
    ([1, 1, 1, 1], [1, 3, 3, 3])
    """
    others = min(rounds, count) - 1
    return [1, *((count - 1) * (i + 1) // others - (count - 1) * i // others for i in range(others))]
