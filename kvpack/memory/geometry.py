"""What an adapter says of its model."""

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory.shard import Shard


class Rotary(Protocol):
    """A family's own way from positions to angles; a frozen dataclass, so that geometries can be compared."""

    def __call__(self, positions: Tensor) -> Tensor:
        """Angles of a head's channel pairs, of all heads alike or of each its own, in float32 or wider.

        Args:
            positions: (t, y, x) of tokens, `[rows, tokens, 1 or heads, 3]`.

        Returns:
            `[rows, tokens, 1 or heads, head_dim / 2]`.
        """
        ...


@dataclass(frozen=True)
class Geometry:
    """Shape of a causal video transformer's self-attention memory.

    Args:
        layers: transformer layers that keep keys and values.
        heads: attention heads of a layer.
        head_dim: channels of a head.
        grid: token rows and columns of one latent frame.
        rope_split: channels of a head that turn with time, row and column; they sum to `head_dim`.
        rope_theta: base of the rotary frequencies.
        dtype: dtype of keys and values.
        rotary: angles of a family whose frequencies are others than those of `rope_split` and `rope_theta`.
        frames: latent frames of the whole video, if they are known: memory is then made for all of it at once.

    >>> wan = Geometry(30, 12, 128, (30, 52), (44, 42, 42), dtype=torch.bfloat16)
    >>> wan.tokens_per_frame, wan.kv_bytes_per_token
    (1560, 184320)
    """

    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int]
    rope_split: tuple[int, int, int] = (0, 0, 0)
    rope_theta: float = 10000.0
    dtype: torch.dtype = torch.float32
    rotary: Rotary | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_dim"):
            require_int(name, getattr(self, name), minimum=1)
        for side in self.grid:
            require_int("grid", side, minimum=1)
        # Even, since RoPE turns pairs of channels.
        split_is_wrong = sum(self.rope_split) != self.head_dim or any(part % 2 for part in self.rope_split)
        if self.rotary is None and split_is_wrong:
            raise InvalidOptionError(
                f"rope_split must be three even numbers that sum to head_dim {self.head_dim}, got {self.rope_split}"
            )

    @property
    def shard(self) -> Shard | None:
        """The process that holds these heads; None where one process holds all of a layer's."""
        return None

    def sum_heads(self, mine: Tensor) -> Tensor:
        """Return the sum over processes of what is a sum over the heads of one."""
        return mine if self.shard is None else self.shard.sum(mine)

    def mean_heads(self, mine: Tensor) -> Tensor:
        """Return the mean over processes of what is a mean over the heads of one."""
        return mine if self.shard is None else self.shard.sum(mine) / self.shard.ranks

    def all_heads(self, mine: Tensor) -> Tensor:
        """Return a tensor `[rows, tokens, heads, ...]` with the heads of all processes."""
        return mine if self.shard is None else self.shard.gather(mine, 2)

    def own_heads(self, every: Tensor) -> Tensor:
        """Return this process's heads of a tensor that has all of them, likewise."""
        return every if self.shard is None else self.shard.own(every, 2)

    @property
    def width(self) -> int:
        """Channels of a hidden token."""
        return self.heads * self.head_dim

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame at full resolution."""
        return self.grid[0] * self.grid[1]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class ShardedGeometry(Geometry):
    """A model's geometry as one of several processes sees it, with the heads that it holds."""

    shard: Shard | None = None  # type: ignore[misc]  # a property of the whole model's

    @classmethod
    def of(cls, whole: Geometry, shard: Shard) -> "ShardedGeometry":
        """Return the geometry of a process."""
        own = {each.name: getattr(whole, each.name) for each in fields(whole)}
        return cls(**{**own, "heads": whole.heads // shard.ranks}, shard=shard)
