"""Clean clips as keys and values by chunk, and the model over any history of them: training without rollouts.

Keys and values of clean frames do not depend on what is trained. So each clip is committed once, and a training step is
one forward of a chunk behind a history that is put together from the bank. At the shipped pipeline's sizes: chunks of
four frames of 4x4 tokens, sink of two chunks, recent of one, four positions for the middle, as `fit` gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.toyworld import world
from kvpack.adapters import WanAdapter, attention
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.rope import rotate, rotations
from kvpack.shipped import CALL, shipped_folder
from kvpack.training.clips import Clip
from kvpack.training.compressor import frozen
from kvpack.training.noise import generator, mixed, noise_levels, noise_like

FRAMES, GRID = 4, (4, 4)
#: (t, y, x) of a chunk's tokens.
PLACES = grid_coordinates(FRAMES, GRID)
SINK, FIRST = 2, 4  # chunks of the sink; the first chunk that has a middle
#: Where the middle begins, where recent frames do, and the chunk; all without a middle four earlier.
MIDDLE, RECENT, HERE = 8.0, 12.0, 16.0
LEVEL = 1  # of six denoising steps: sigma .94, where the middle matters most


@dataclass(frozen=True, eq=False)
class Part:
    """Some tokens of a history.

    Args:
        keys: keys before RoPE, `[rows, tokens, heads, head_dim]`.
        values: values.
        places: (t, y, x) in the model's positions, `[rows or 1, tokens, 3]`.
        gates: how much of each token there is, `[rows, tokens]`; all of it if None.
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    gates: Tensor | None = None


#: What of the middle is attended by a layer's queries.
Middle = Callable[[Tensor], Part]


def placed(places: Tensor, start: Tensor | float, length: float = FRAMES) -> Tensor:
    """Return places of a block whose frames begin at position `start` and are squeezed to `length` positions."""
    moved = places.clone()
    moved[..., 0] = start + (moved[..., 0] + 0.5) * length / FRAMES - 0.5
    return moved


def mass(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the score of `softmax-mass` of blocks `[rows, blocks, tokens, heads, head_dim]`, `[rows, blocks]`."""
    products = torch.einsum("bihd,bmjhd->bmhij", queries / queries.shape[-1] ** 0.5, keys)
    return products.logsumexp(dim=4).mean(dim=(2, 3))


@dataclass(eq=False)
class History:
    """What a layer attends: sink, middle and recent chunks, and the tokens of the forward themselves.

    Args:
        toy: the model.
        whole: keys and values of whole chunks: of the sink and, last, the recent one, if there is one yet.
        middle: what else is attended, if anything.
        start: position of the forward's tokens; behind the others if None.
        own: (t, y, x) of the forward's tokens.
    """

    toy: Toy
    whole: Sequence[tuple[Tensor, Tensor]]
    middle: Middle | None = None
    start: float | None = None
    own: Tensor = PLACES
    kept: tuple[Tensor, Tensor] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the forward."""
        return len(self.own)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, attention: Any) -> Tensor:
        """Return the attention of the forward's tokens; keeps their keys and values."""
        self.kept = keys, values
        squeezed = self.middle is not None or self.start is not None
        starts = [0.0, 4.0, RECENT if squeezed else MIDDLE][: len(self.whole)]
        parts = [Part(*pair, placed(PLACES, at)[None]) for pair, at in zip(self.whole, starts, strict=True)]
        if self.middle is not None:
            parts.append(self.middle(queries))
        behind = HERE if squeezed else 4.0 * len(self.whole)
        here = placed(self.own, behind if self.start is None else self.start)[None]
        parts.append(Part(keys, values, here))
        places = torch.cat([each.places.expand(len(keys), -1, -1) for each in parts], dim=1)
        geometry = self.toy.geometry
        attended = rotate(torch.cat([each.keys for each in parts], dim=1), rotations(places, geometry))
        queries, values = rotate(queries, rotations(here, geometry)), torch.cat([each.values for each in parts], dim=1)
        if all(each.gates is None for each in parts):
            return attention(queries, attended, values)
        some = [torch.ones(each.keys.shape[:2]) if each.gates is None else each.gates for each in parts]
        return gated(queries, attended, values, torch.cat(some, dim=1))


def gated(queries: Tensor, keys: Tensor, values: Tensor, gates: Tensor) -> Tensor:
    """Return attention in which a token of gate 0 is absent, with gradients for it all the same."""
    logits = torch.einsum("bihd,bjhd->bhij", queries, keys) / queries.shape[-1] ** 0.5
    weights = (logits - logits.amax(dim=-1, keepdim=True).detach()).exp() * gates[:, None, None]
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(dim=-1, keepdim=True), values)


class Toy:
    """The shipped pipeline, frozen."""

    def __init__(self) -> None:
        pipeline = frozen(shipped_folder(), torch.float32, "cpu")
        self.trainee = WanAdapter().trainee(pipeline, CALL["max_sequence_length"])
        rollout = self.trainee.rollout(_any_stack(), self.trainee.embed(["a"]), GRID)
        self.geometry, self.transformer = rollout.denoiser.geometry, pipeline.transformer
        self.sigma, self.timestep = noise_levels(pipeline.scheduler, 6)[LEVEL]

    def forward(self, latents: Tensor, timestep: float, embeds: Tensor, layers: Sequence[History]) -> Tensor:
        """Return the velocity of a chunk; the layers attend what they are given."""
        attentions = [block.attn1 for block in self.transformer.blocks]
        with attention.attached(self.transformer, attentions, lambda *_: layers):
            timesteps = torch.full((len(latents),), timestep)
            return self.transformer(latents, timesteps, embeds, return_dict=False)[0]


def _any_stack() -> Any:
    from kvpack.policies import packforcing

    return packforcing()


def whole_blocks(keys: Tensor, values: Tensor, topk: int) -> Middle:
    """Attend the `topk` whole blocks of largest mass, of `[rows, blocks, tokens, heads, head_dim]`."""

    def middle(queries: Tensor) -> Part:
        count = min(topk, keys.shape[1])
        chosen = mass(queries, keys).topk(count, dim=1).indices.sort(dim=1).values
        rows = torch.arange(len(keys))[:, None]
        starts = MIDDLE + 4 / count * torch.arange(count)[:, None]
        places = placed(PLACES.expand(count, -1, -1), starts, 4 / count).flatten(0, 1)[None]
        return Part(keys[rows, chosen].flatten(1, 2), values[rows, chosen].flatten(1, 2), places)

    return middle


@dataclass(eq=False)
class Bank:
    """Clips, and what the model predicts of their chunks behind all that matters and behind no middle at all.

    Args:
        latents: `[clips, channels, frames, rows, columns]`.
        embeds: of captions.
        noise: of each chunk, `[clips, chunks, channels, frames, rows, columns]`.
        keys: before RoPE, `[clips, chunks, tokens, heads, head_dim]` of each layer.
        values: the same of values.
        wanted: velocities behind the four whole blocks of largest mass (recall above .9), as `noise`.
        without: velocities behind sink and recent alone.
    """

    latents: Tensor
    embeds: Tensor
    noise: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    wanted: Tensor
    without: Tensor

    @property
    def worth(self) -> Tensor:
        """How much the middle matters: squared difference of both predictions, `[clips, chunks, frames, y, x]`."""
        return (self.wanted.float() - self.without.float()).square().mean(dim=2)

    def whole(self, layer: int, clips: Any, chunk: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a chunk of some clips."""
        return self.keys[layer][clips, chunk].float(), self.values[layer][clips, chunk].float()

    def middle(self, layer: int, clips: Any, chunk: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of all blocks between sink and recent, `[clips, blocks, tokens, heads, head_dim]`."""
        some = slice(SINK, chunk - 1)
        return self.keys[layer][clips][:, some].float(), self.values[layer][clips][:, some].float()

    def ends(self, layer: int, clips: Any, chunk: int) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of sink and recent chunk, as far as there are any."""
        chunks = [*range(min(SINK, chunk)), *([chunk - 1] if chunk > SINK else [])]
        return [self.whole(layer, clips, each) for each in chunks]


@torch.no_grad()
def made(toy: Toy, clips: Sequence[Clip], seed: int = 0, batch: int = 16) -> Bank:
    """Commit every chunk of clips of one length, and predict those that have a middle."""
    latents, embeds = torch.stack([each.latents for each in clips]).half(), torch.stack([each.embeds for each in clips])
    chunks, layers = latents.shape[2] // FRAMES, toy.geometry.layers
    tokens = (len(clips), chunks, len(PLACES), toy.geometry.heads, toy.geometry.head_dim)
    noise = noise_like(torch.empty(len(clips), chunks, latents.shape[1], FRAMES, *GRID), generator(seed)).half()
    keys, values = ([torch.zeros(tokens, dtype=torch.half) for _ in range(layers)] for _ in range(2))
    bank = Bank(latents, embeds, noise, keys, values, torch.zeros_like(noise), torch.zeros_like(noise))
    for first in range(0, len(clips), batch):
        some = slice(first, first + batch)
        for chunk in range(chunks):
            _add(toy, bank, some, chunk)
        print(f"bank: {min(first + batch, len(clips))} of {len(clips)} clips", flush=True)
    return bank


def _add(toy: Toy, bank: Bank, clips: slice, chunk: int) -> None:
    clean, embeds = bank.latents[clips, :, FRAMES * chunk : FRAMES * (chunk + 1)].float(), bank.embeds[clips]

    def layers(middle: bool) -> list[History]:
        return [
            History(
                toy,
                bank.ends(layer, clips, chunk),
                whole_blocks(*bank.middle(layer, clips, chunk), topk=4) if middle and chunk >= FIRST else None,
            )
            for layer in range(toy.geometry.layers)
        ]

    if chunk >= FIRST:
        noisy = mixed(clean, bank.noise[clips, chunk].float(), toy.sigma)
        bank.wanted[clips, chunk] = toy.forward(noisy, toy.timestep, embeds, layers(True)).half()
        bank.without[clips, chunk] = toy.forward(noisy, toy.timestep, embeds, layers(False)).half()
    committed = layers(True)
    toy.forward(clean, 0.0, embeds, committed)
    for layer, each in enumerate(committed):
        assert each.kept is not None
        bank.keys[layer][clips, chunk], bank.values[layer][clips, chunk] = (part.half() for part in each.kept)


def rendered(toy: Toy, count: int, frames: int, seed: int) -> list[Clip]:
    """Render and encode training clips of the toy world."""
    scenes, found = world.scenes_of(world.LIT), []
    for index in range(count):
        scene = scenes[index % len(scenes)]
        video = torch.from_numpy(world.make_clip(scene, seed + index, 4 * frames - 3).video)
        pixels = video.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        found.append(Clip(f"{index}", toy.trainee.encode(pixels)[0], toy.trainee.embed([scene.caption])[0]))
    return found
