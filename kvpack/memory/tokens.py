"""Keys and values of some tokens of one layer, and where each token sits in the video."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvpack.memory.geometry import Geometry
from kvpack.memory.rope import joined_places, rotate, rotations
from kvpack.memory.store import StoredBlock

#: Makes keys of what is stored, some tokens after the others, whenever they are rotated.
Later = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Keys before RoPE and values of one layer, and where each token sits.

    Args:
        keys: keys after their norm and before RoPE.
        values: values.
        coordinates: (t, y, x) of each token, t in latent frames of the video; with one row for all rows, and with an
            axis of heads only where each head keeps tokens of its own.
        bias: what is added to the logits of queries that attend these tokens.
        block: the handle of tokens that the engine stores.
        later: makes the keys, of which `keys` has no more than the shape (it is NaN), so that they are not held.
    """

    keys: Float[Tensor, "batch tokens heads head_dim"]
    values: Float[Tensor, "batch tokens heads head_dim"]
    coordinates: Float[Tensor, "rows tokens 3"] | Float[Tensor, "rows tokens heads 3"]
    bias: float = 0.0
    block: StoredBlock | None = None
    later: Later | None = None

    def __len__(self) -> int:
        return self.keys.shape[1]

    def __getitem__(self, some: slice) -> "Tokens":
        """Return a run of tokens."""
        return Tokens(self.keys[:, some], self.values[:, some], self.coordinates[:, some], self.bias)

    def __add__(self, other: "Tokens") -> "Tokens":
        """Return these tokens and, behind them, others of the same bias."""
        return Tokens(
            torch.cat([self.keys, other.keys], dim=1),
            torch.cat([self.values, other.values], dim=1),
            joined_places([self.coordinates, other.coordinates]),
            self.bias,
        )

    def compact(self) -> "Tokens":
        """Return the same tokens in tensors of their own, where they are a part of larger ones."""
        return Tokens(self.keys.clone(), self.values.clone(), self.coordinates.clone(), self.bias)

    def rotated_keys(self, geometry: Geometry) -> Float[Tensor, "batch tokens heads head_dim"]:
        """Return the keys after RoPE at these places."""
        return rotate(self.keys, rotations(self.coordinates, geometry))

    def take(self, index: Int[Tensor, "batch kept"] | Int[Tensor, "batch kept heads"]) -> "Tokens":
        """Return the tokens of each row, or of each row's heads, at some indices."""
        rows, heads = self.keys.shape[0], self.keys.shape[2]
        each = index if index.ndim == 3 else index[..., None].expand(-1, -1, heads)
        wide = each[..., None].expand(-1, -1, -1, self.keys.shape[3])
        coordinates = self.coordinates.expand(rows, *self.coordinates.shape[1:])
        if index.ndim == 3 and coordinates.ndim == 3:
            coordinates = coordinates[:, :, None].expand(-1, -1, heads, -1)
        where = (each if coordinates.ndim == 4 else index)[..., None].expand(*([-1] * (coordinates.ndim - 1)), 3)
        keys, values = self.keys.gather(1, wide), self.values.gather(1, wide)
        return Tokens(keys, values, coordinates.gather(1, where), self.bias)

    def moved(self, frames: float | Tensor) -> "Tokens":
        """Return the same tokens, later; `frames` may be a scalar on the device."""
        coordinates = self.coordinates.clone()  # layers share coordinates
        coordinates[..., 0] += frames
        return replace(self, coordinates=coordinates)

    def starting_at(self, frame: float) -> "Tokens":
        """Return the same tokens, the first of them, of whichever row and head, at `frame`."""
        return self.moved(frame - self.coordinates[..., 0].min()) if len(self) else self


def consecutive(
    parts: Sequence[Tokens], start: float = 0.0, *, frame_tokens: int | None = None
) -> tuple[list[Tokens], float]:
    """Place parts one behind the other in time, without gaps between them; return them and the position behind them.

    Each part keeps the distances of its own frames. How long it is goes by all rows and heads together: where they keep
    tokens of other times, place them by `moved`, row by row, or a row depends on the others.

    Args:
        parts: some tokens each, or none.
        start: position of the first.
        frame_tokens: tokens of a frame, if no part has gaps: how long each is follows from it, and nothing waits for
            the device.
    """
    placed = []
    for part in filter(len, parts):
        placed.append(part.starting_at(start))
        if frame_tokens is None:
            start = float(placed[-1].coordinates[..., 0].max()) + 1.0  # waits for the device
        else:
            start += len(part) // frame_tokens
    return placed, start


def shortened(parts: Sequence[Tokens], tokens: int) -> list[Tokens]:
    """Return parts without the last `tokens` tokens of them all."""
    left = []
    for part in reversed(parts):
        cut = min(tokens, len(part))
        left.append(part[: len(part) - cut])
        tokens -= cut
    return left[::-1]


def taken(
    tokens: Float[Tensor, "batch tokens *each"], index: Int[Tensor, "batch kept"]
) -> Float[Tensor, "batch kept *each"]:
    """Return each row's tokens, or their places, at its indices."""
    if index.shape[0] == 1:  # one row: a plain selection is cheaper than an index of two axes
        return tokens.index_select(1, index[0])
    return tokens[torch.arange(index.shape[0], device=index.device)[:, None], index]
