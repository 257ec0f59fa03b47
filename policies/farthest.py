"""Tokens whose keys are as unlike each other as can be: greedy k-centre (Gonzalez, 1985; cf. arXiv 1708.00489)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.linalg import vector_norm


def joined_heads(keys: Float[Tensor, "batch tokens heads head_dim"]) -> Float[Tensor, "batch tokens width"]:
    """Return keys of all heads as one vector of length 1, in float32."""
    unit = keys.detach().flatten(2).to(torch.float32, copy=True)  # [rows, tokens, heads * head_dim]
    return unit.div_(vector_norm(unit, dim=-1, keepdim=True).clamp_min_(1e-12))


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
        new = framed.add(later, alpha=4).flatten(1).topk(size, dim=1, largest=False).indices  # (batch, size)
        chosen.append(new)
        centres = unit.gather(1, new[..., None].expand(-1, -1, unit.shape[2]))
        like = (unit @ centres.transpose(1, 2)).amax(dim=2)  # (batch, tokens), of (batch, tokens, size)
        nearest = like if index == 0 else torch.maximum(nearest, like)
        nearest.scatter_(1, new, torch.inf)  # never again, though all were alike
    return torch.cat(chosen, dim=1)


def unlike(
    keys: Float[Tensor, "batch tokens heads head_dim"], count: int, rounds: int = 16
) -> Int[Tensor, "batch count"]:
    """Return indices of the tokens that are most unlike each other, wherever they lie; the first, if one is wanted.

    Args:
        keys: keys before RoPE.
        count: how many.
        rounds: most passes over them.
    """
    if count == 1:  # of two tokens both are equally unlike their mean, and rounding would decide
        return torch.zeros(len(keys), 1, dtype=torch.long, device=keys.device)
    return farthest(joined_heads(keys), keys.shape[1], count, rounds)


def round_sizes(count: int, rounds: int) -> list[int]:
    """Return how many tokens each round takes: the first one, the others as equal numbers as can be.

    >>> round_sizes(4, 16), round_sizes(10, 4)
    ([1, 1, 1, 1], [1, 3, 3, 3])
    """
    others = min(rounds, count) - 1
    return [1, *((count - 1) * (i + 1) // others - (count - 1) * i // others for i in range(others))]
