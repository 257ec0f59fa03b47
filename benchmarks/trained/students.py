"""What is trained to stand for a block: a choice of its tokens, learned summaries of them, or tokens of its latents."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, silu

from benchmarks.trained.bank import FIRST, FRAMES, HERE, MIDDLE, PLACES, SINK, Bank, History, Middle, Part, Toy, mass
from benchmarks.trained.bank import placed as placed_at
from kvpack.adapters import attention
from kvpack.adapters.wan.compression import forward_tokens
from kvpack.compressors.network import HighResolutionBranch
from kvpack.policies.farthest import farthest, joined_heads

LAYERS, WIDTH = 6, 128
#: Where the two latent tokens of a block sit.
TWINS = torch.tensor([[0.5, 1.5, 1.5], [2.5, 1.5, 1.5]])


class Student(nn.Module):
    """Attends `topk` blocks of a few tokens each, chosen as `softmax-mass` does."""

    def __init__(self, topk: int) -> None:
        super().__init__()
        self.topk = topk

    def begin(self, toy: Toy, bank: Bank, clips: Tensor, chunk: int) -> None:
        """Prepare for the chunk of these clips."""

    @abstractmethod
    def blocks(self, layer: int, keys: Tensor, values: Tensor) -> Part:
        """Return what stands for blocks `[rows, blocks, tokens, heads, head_dim]`, with as many axes.

        Places are (t, y, x) inside a block.
        """

    def middle(self, layer: int, whole_keys: Tensor, whole_values: Tensor) -> Middle:
        """Return what a layer attends between sink and recent chunks."""

        def attended(queries: Tensor) -> Part:
            made = self.blocks(layer, whole_keys, whole_values)
            count, rows = min(self.topk, made.keys.shape[1]), torch.arange(len(queries))[:, None]
            with torch.no_grad():
                held = made.keys if made.gates is None else _only(made.keys, made.gates > 0.5)
                chosen = mass(queries, held).topk(count, dim=1).indices.sort(dim=1).values
            starts = (MIDDLE + FRAMES / count * torch.arange(count))[:, None]
            keys, values, places = (each[rows, chosen] for each in (made.keys, made.values, made.places))
            gates = None if made.gates is None else made.gates[rows, chosen].flatten(1, 2)
            places = placed_at(places, starts, FRAMES / count)
            return Part(keys.flatten(1, 2), values.flatten(1, 2), places.flatten(1, 2), gates)

        return attended


def _only(tokens: Tensor, which: Tensor) -> Tensor:
    """Return the tokens of each block that `which` says, as many of all."""
    return tokens[which].view(*tokens.shape[:2], -1, *tokens.shape[3:])


class Features(nn.Module):
    """One hidden layer over a token's key and value, of each of the model's layers, with dropout while it is trained.

    Args:
        outputs: of each token.
        hidden: width.
        drop: share of what is dropped.
    """

    def __init__(self, outputs: int = 1, hidden: int = 16, drop: float = 0.2) -> None:
        super().__init__()
        self.drop = drop
        self.first = nn.Parameter(torch.randn(LAYERS, 2 * WIDTH, hidden) / (2 * WIDTH) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(LAYERS, 1, hidden))
        self.last = nn.Parameter(torch.zeros(LAYERS, hidden, outputs))
        self.place = nn.Parameter(torch.zeros(LAYERS, len(PLACES), outputs))
        self.scales = nn.Parameter(torch.ones(LAYERS, 2), requires_grad=False)

    def scale(self, bank: Bank) -> None:
        """Measure how large keys and values are."""
        for layer in range(LAYERS):
            for index, each in enumerate((bank.keys[layer], bank.values[layer])):
                self.scales[layer, index] = each[:16].float().square().mean().sqrt()

    def joined(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        """Return keys and values of all heads at one size."""
        pairs = zip((keys, values), self.scales[layer], strict=True)
        return torch.cat([each.flatten(-2) / scale for each, scale in pairs], dim=-1)

    def forward(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        """Return `[..., tokens, outputs]` of `[..., tokens, heads, head_dim]`."""
        inputs = dropout(self.joined(layer, keys, values), self.drop, self.training)
        hidden = dropout(silu(inputs @ self.first[layer] + self.bias[layer]), self.drop, self.training)
        return hidden @ self.last[layer] + self.place[layer]


def chosen_with(unit: Tensor, offsets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose tokens as `keep-farthest` does, each the greatest in `offsets` less its likeness to the kept ones.

    Args:
        unit: vectors of length 1, `[rows, tokens, width]`.
        offsets: what each token is worth, `[rows, tokens]`; zeros are `keep-farthest`.
        count: how many are kept.

    Returns:
        Indices `[rows, count]`, and what each token had when it was chosen, or has in the end.
    """
    likeness, chosen = (unit @ unit.mean(dim=1, keepdim=True).transpose(1, 2)).squeeze(2), []
    score, left = offsets - likeness, torch.ones_like(offsets, dtype=torch.bool)
    for index in range(count):
        best = score.where(left, -torch.inf).argmax(dim=1, keepdim=True)
        chosen.append(best)
        left = left.scatter(1, best, False)
        like = (unit @ unit.gather(1, best[..., None].expand(-1, -1, unit.shape[2])).transpose(1, 2)).squeeze(2)
        likeness = like if index == 0 else torch.maximum(likeness, like)
        score = torch.where(left, offsets - likeness, score) if index < count - 1 else score
    return torch.cat(chosen, dim=1), score


class Kept(Student):
    """Some of a block's own tokens: the farthest, with or without a learned offset, or those of highest score.

    Gradients reach the offsets through gates that are 0 or 1 forwards and smooth backwards (straight-through).

    Args:
        tokens: kept of a block.
        topk: blocks attended.
        how: "farthest", "random", "offset" or "score".
    """

    noise, softness = 0.03, 0.15

    def __init__(self, tokens: int, topk: int, how: str) -> None:
        super().__init__(topk)
        self.tokens, self.how = tokens, how
        self.features = Features() if how in ("offset", "score") else None
        if how == "score":
            assert self.features is not None
            nn.init.normal_(self.features.last, std=0.1)

    def blocks(self, layer: int, keys: Tensor, values: Tensor) -> Part:
        """Choose in each block."""
        rows, offsets = (keys.shape[0] * keys.shape[1], len(PLACES)), keys.new_zeros(keys.shape[:3])
        if self.features is not None:
            offsets = self.features(layer, keys, values).squeeze(-1)
        index, score, noisy = self._chosen(joined_heads(keys.flatten(0, 1)), offsets.detach().reshape(rows))
        places = PLACES.expand(*keys.shape[:2], -1, -1)
        if self.training:
            hard = torch.zeros(rows).scatter(1, index, 1.0)
            last = score.where(hard > 0, torch.inf).amin(dim=1, keepdim=True)
            edge = (last + score.where(hard < 1, -torch.inf).amax(dim=1, keepdim=True)) / 2
            smooth = ((score - noisy + offsets.reshape(rows) - edge) / self.softness).sigmoid()
            return Part(keys, values, places, (hard + smooth - smooth.detach()).view(offsets.shape))
        which = torch.zeros(rows, dtype=torch.bool).scatter(1, index, True).view(offsets.shape)
        return Part(_only(keys, which), _only(values, which), _only(places, which))

    @torch.no_grad()
    def _chosen(self, unit: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return indices, scores, and the offsets that they are of."""
        noisy = offsets + self.noise * torch.randn_like(offsets) if self.training else offsets
        if self.how == "random":
            noisy = torch.rand(unit.shape[:2], generator=torch.Generator().manual_seed(0))
        if self.how in ("random", "score"):
            return noisy.topk(self.tokens, dim=1).indices, noisy, noisy
        if self.how == "farthest":
            return farthest(unit, 1, self.tokens, self.tokens), noisy, noisy
        return *chosen_with(unit, noisy, self.tokens), noisy


class Hybrid(Student):
    """The farthest tokens of a block, and learned summaries: softmax means of its tokens and a linear residual.

    Args:
        tokens: kept of a block.
        summaries: learned tokens beside them.
        topk: blocks attended.
    """

    def __init__(self, tokens: int, summaries: int, topk: int) -> None:
        super().__init__(topk)
        self.tokens, self.features = tokens, Features(summaries, drop=0.0)
        nn.init.normal_(self.features.last, std=0.3)
        self.residual = nn.Parameter(torch.zeros(LAYERS, 2 * WIDTH, 2 * WIDTH))

    def blocks(self, layer: int, keys: Tensor, values: Tensor) -> Part:
        """Keep and summarise."""
        weights = self.features(layer, keys, values).softmax(dim=2)  # over tokens: (rows, blocks, tokens, summaries)
        key, value = (torch.einsum("bmjs,bmjhd->bmshd", weights, each) for each in (keys, values))
        residual = self.features.joined(layer, key, value) @ self.residual[layer]
        key, value = (
            each + scale * part.reshape(each.shape)
            for each, scale, part in zip((key, value), self.features.scales[layer], residual.chunk(2, -1), strict=True)
        )
        places = torch.einsum("bmjs,jc->bmsc", weights, PLACES)
        if not self.tokens:
            return Part(key, value, places)
        index = farthest(joined_heads(keys.flatten(0, 1)), 1, self.tokens, self.tokens)
        which = torch.zeros(len(index), len(PLACES), dtype=torch.bool).scatter(1, index, True).view(keys.shape[:3])
        own = PLACES.expand(*keys.shape[:2], -1, -1)
        pairs = ((keys, key), (values, value), (own, places))
        keys, values, places = (torch.cat([_only(mine, which), new], dim=2) for mine, new in pairs)
        return Part(keys, values, places)


class Twins(Student):
    """Two tokens of a block by `hr`: from its latents, through all layers behind sink and the chunk before.

    Args:
        hidden: channels.
        topk: blocks attended.
    """

    def __init__(self, hidden: int, topk: int) -> None:
        super().__init__(topk)
        self.branch = HighResolutionBranch(channels=16, width=WIDTH, patch=(1, 1), hidden=hidden, branches="hr")
        self.made: list[Any] = []

    def begin(self, toy: Toy, bank: Bank, clips: Tensor, chunk: int) -> None:
        """Make tokens of all blocks between sink and recent at once."""
        rows, count = len(clips), chunk - FIRST + 1
        latents = bank.latents[clips][:, :, FRAMES * SINK : FRAMES * (chunk - 1)].float()
        blocks = latents.unflatten(2, (count, FRAMES)).transpose(1, 2).flatten(0, 1)
        layers = []
        for layer in range(LAYERS):
            keys, values = (each[layer][clips, :chunk].float() for each in (bank.keys, bank.values))
            ends = [slice(0, 1), slice(1, 2)]
            pairs = [tuple(e[:, s].expand(-1, count, -1, -1, -1).flatten(0, 1) for e in (keys, values)) for s in ends]
            pairs.append(tuple(each[:, SINK - 1 : chunk - 2].flatten(0, 1) for each in (keys, values)))
            layers.append(History(toy, pairs, start=HERE, own=TWINS))  # type: ignore[arg-type]
        tokens, embeds = self.branch(blocks, (2, 1, 1)), bank.embeds[clips].repeat_interleave(count, dim=0)
        transformer, times = toy.transformer, torch.zeros(len(blocks))
        with attention.attached(transformer, [each.attn1 for each in transformer.blocks], lambda *_: layers):
            forward_tokens(transformer, tokens, lambda dummy: transformer(dummy, times, embeds, return_dict=False))
        self.made = [tuple(part.unflatten(0, (rows, count)) for part in each.kept) for each in layers if each.kept]

    def blocks(self, layer: int, keys: Tensor, values: Tensor) -> Part:
        """Return what `begin` made."""
        made_keys, made_values = self.made[layer]
        return Part(made_keys, made_values, TWINS.expand(*keys.shape[:2], -1, -1))
