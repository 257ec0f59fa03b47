"""The wide role: a method that four small policies cannot say, as functions of a value that holds its past."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvpack.errors import InvalidOptionError, PolicyError
from kvpack.memory.geometry import Geometry
from kvpack.memory.roles import LatentCompressor, Policy
from kvpack.memory.rope import rotate, rotations
from kvpack.memory.store import PackedBuffer

if TYPE_CHECKING:
    from kvpack.memory.session import AnySession

Commit = Literal["rerun", "last-step"]
Event = Literal["prompt-changed", "scene-cut"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Keys before RoPE and values of one layer, and where each token sits.

    Args:
        keys: keys after their norm and before RoPE.
        values: values.
        coordinates: (t, y, x) of each token, t in latent frames of the video; with one row for all rows, and with an
            axis of heads only where each head keeps tokens of its own.
        bias: what is added to the logits of queries that attend these tokens.
    """

    keys: Float[Tensor, "batch tokens heads head_dim"]
    values: Float[Tensor, "batch tokens heads head_dim"]
    coordinates: Float[Tensor, "rows tokens 3"] | Float[Tensor, "rows tokens heads 3"]
    bias: float = 0.0

    def __len__(self) -> int:
        return self.keys.shape[1]

    def __getitem__(self, some: slice) -> "Tokens":
        """A run of tokens."""
        return replace(
            self, keys=self.keys[:, some], values=self.values[:, some], coordinates=self.coordinates[:, some]
        )

    def __add__(self, other: "Tokens") -> "Tokens":
        """These tokens and, behind them, others of the same bias."""
        coordinates = [self.coordinates, other.coordinates]
        rows = max(each.shape[0] for each in coordinates)
        if {each.ndim for each in coordinates} == {3, 4}:
            heads = self.keys.shape[2]
            coordinates = [
                each if each.ndim == 4 else each[:, :, None].expand(-1, -1, heads, -1) for each in coordinates
            ]
        coordinates = [each.expand(rows, *each.shape[1:]) for each in coordinates]
        return replace(
            self,
            keys=torch.cat([self.keys, other.keys], dim=1),
            values=torch.cat([self.values, other.values], dim=1),
            coordinates=torch.cat(coordinates, dim=1),
        )

    def rotated_keys(self, geometry: Geometry) -> Float[Tensor, "batch tokens heads head_dim"]:
        """Keys after RoPE at these places."""
        return rotate(self.keys, rotations(self.coordinates, geometry))

    def take(self, index: Int[Tensor, "batch kept"] | Int[Tensor, "batch kept heads"]) -> "Tokens":
        """The tokens of each row, or of each row's heads, at some indices."""
        rows, heads = self.keys.shape[0], self.keys.shape[2]
        each = index if index.ndim == 3 else index[..., None].expand(-1, -1, heads)
        wide = each[..., None].expand(-1, -1, -1, self.keys.shape[3])
        coordinates = self.coordinates.expand(rows, *self.coordinates.shape[1:])
        if index.ndim == 3 and coordinates.ndim == 3:
            coordinates = coordinates[:, :, None].expand(-1, -1, heads, -1)
        where = (each if coordinates.ndim == 4 else index)[..., None].expand(*([-1] * (coordinates.ndim - 1)), 3)
        return replace(
            self,
            keys=self.keys.gather(1, wide),
            values=self.values.gather(1, wide),
            coordinates=coordinates.gather(1, where),
        )

    def moved(self, frames: float) -> "Tokens":
        """The same tokens, later."""
        coordinates = self.coordinates.clone()
        coordinates[..., 0] += frames
        return replace(self, coordinates=coordinates)

    def starting_at(self, frame: float) -> "Tokens":
        """The same tokens, the first of them at `frame`."""
        return self.moved(frame - float(self.coordinates[..., 0].min())) if len(self) else self


@dataclass(frozen=True, eq=False)
class Chunk:
    """The chunk that is being generated, as one layer sees it in one forward.

    Args:
        queries: queries after their norm and before RoPE.
        tokens: its keys, values and true places.
        layer: index of the layer.
        index: index of the chunk.
        first_frame: index of its first latent frame.
        frames: latent frames of it.
        step: denoising step; -1 in the forward of the clean chunk.
        geometry: the model.
        earlier: queries of the forwards of this chunk before this one, oldest first, if the memory hears queries.
        latents: the clean latents, in the forward of the clean chunk.
    """

    queries: Float[Tensor, "batch tokens heads head_dim"]
    tokens: Tokens
    layer: int
    index: int
    first_frame: int
    frames: int
    step: int
    geometry: Geometry
    earlier: tuple[Tensor, ...] = ()
    latents: Float[Tensor, "batch channels frames height width"] | None = None

    def rotated(self, queries: Tensor) -> Tensor:
        """Queries of this chunk after RoPE at their places in the video."""
        return rotate(queries, rotations(self.tokens.coordinates, self.geometry))


@dataclass(frozen=True, eq=False)
class Attended:
    """What a chunk attends beside itself.

    Args:
        tokens: at the places where they are attended.
        chunk_start: temporal position of the chunk's first frame.
        state: what is handed to `remember` in the place of the state before.
        hidden: first tokens of the chunk that not even the chunk attends.
    """

    tokens: tuple[Tokens, ...]
    chunk_start: float
    state: Any
    hidden: int = 0


class Memory(Policy, ABC):
    """What of the past a chunk attends. A frozen dataclass; what belongs to one generation is the state it is given.

    `Stack` is a memory of four small policies. A method that they cannot say is a subclass of `StateMemory`.
    """

    role: ClassVar[str] = "memory"
    chunk_frames: int
    #: Which keys and values become history (see `Stack`).
    commit: ClassVar[Commit] = "rerun"
    #: Latent frames, the last ones, whose clean latents are kept, and forwarded anew under a new prompt.
    replay_frames: int = 0
    #: Whether a replay is one forward of all its frames, which attend each other; otherwise it goes chunk by chunk.
    replays_jointly: ClassVar[bool] = False
    #: Whether every commit is such a replay, which ends with the new chunk.
    replays_always: ClassVar[bool] = False
    #: Whether the first frame of a replay is encoded anew, from its pixels, as the first of a video.
    reencodes: ClassVar[bool] = False
    #: Most times that a chunk is generated anew after a veto.
    most_retries: ClassVar[int] = 0

    @property
    def needs_pixels(self) -> bool:
        """Whether chunks must be decoded as they come."""
        return self.reencodes or (self.latent_compressor is not None and self.latent_compressor.needs_pixels)

    @property
    def latent_compressor(self) -> LatentCompressor | None:
        """What makes hidden tokens of clean latents, if anything does."""
        return None

    @abstractmethod
    def session(self, geometry: Geometry, buffer: type[PackedBuffer] = PackedBuffer) -> "AnySession":
        """The memory of a new generation."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON takes it."""


class StateMemory(Memory):
    """A memory whose past is a value of its own for each layer, and that says what follows from it.

    Nothing is changed in place: `attend` and `remember` return new values, so that a chunk can be done again, a session
    be forked, and a commit is all or nothing.
    """

    #: Whether what is attended depends on the denoising step; otherwise it is settled at the first one.
    every_step: ClassVar[bool] = False
    #: Whether `Chunk.earlier` is told.
    hears_queries: ClassVar[bool] = False

    def start(self, geometry: Geometry, layer: int) -> Any:
        """The state of a layer before the first chunk."""
        return None

    @abstractmethod
    def attend(self, state: Any, chunk: Chunk) -> Attended:
        """What a chunk attends, at its first forward."""

    @abstractmethod
    def remember(self, state: Any, chunk: Chunk) -> Any:
        """The state with the clean chunk in it.

        Args:
            state: what `attend` gave for this chunk.
            chunk: the forward whose keys and values become history.
        """

    def forget(self, state: Any, tokens: int) -> Any:
        """The state without the newest `tokens` tokens of history, which are about to be replayed."""
        raise NotImplementedError(f"{type(self).__name__} has replay_frames, so it must have forget()")

    def happened(self, state: Any, event: Event) -> Any:
        """The state after something has happened between two chunks, before a replay."""
        return state

    def veto(
        self, state: Any, latents: Float[Tensor, "batch channels frames height width"]
    ) -> tuple[Bool[Tensor, " batch"], Any]:
        """Rows whose chunk is to be generated anew, and the state to do it with.

        The state before is there again once all rows are accepted or the retries are used up. All layers must veto the
        same rows. Called only if `most_retries` is not 0.
        """
        raise NotImplementedError(f"{type(self).__name__} has most_retries, so it must have veto()")

    def session(self, geometry: Geometry, buffer: type[PackedBuffer] = PackedBuffer) -> "AnySession":
        """A session that holds a state for each layer."""
        from kvpack.memory.state_session import StateSession

        return StateSession(self, geometry, buffer)

    def to_dict(self) -> dict[str, Any]:
        """Its name and options."""
        if not is_dataclass(self):
            raise InvalidOptionError(f"{type(self).__name__} must be a dataclass to be written as data")
        return {"memory": self.name, **{each.name: getattr(self, each.name) for each in fields(self)}}


def consecutive(parts: Sequence[Tokens], start: float = 0.0) -> tuple[list[Tokens], float]:
    """Parts placed one behind the other in time, without gaps between them, and the position behind the last.

    Each part keeps the distances of its own frames.
    """
    placed = []
    for part in parts:
        if len(part):
            placed.append(part.starting_at(start))
            start = float(placed[-1].coordinates[..., 0].max()) + 1.0
    return placed, start


def shortened(parts: Sequence[Tokens], tokens: int) -> list[Tokens]:
    """Parts without the last `tokens` tokens of them all."""
    left = []
    for part in reversed(parts):
        cut = min(tokens, len(part))
        left.append(part[: len(part) - cut])
        tokens -= cut
    return left[::-1]


def check_tokens(memory: Memory, tokens: object, like: Tensor, layer: int) -> None:
    """Raises `PolicyError` if what a memory wants attended does not fit the model."""
    name = f"{type(memory).__name__}.attend"
    if not isinstance(tokens, Tokens):
        raise PolicyError(f"{name} returned {type(tokens).__name__} in layer {layer}, but it must be Tokens")
    wanted = (like.shape[0], len(tokens), *like.shape[2:])
    for what, tensor in (("keys", tokens.keys), ("values", tokens.values)):
        if tuple(tensor.shape) != wanted or tensor.dtype != like.dtype or tensor.device != like.device:
            raise PolicyError(
                f"{name} returned {what} {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} in layer {layer}, "
                f"but they must be {like.dtype} {wanted} on {like.device}"
            )
    shape = tuple(tokens.coordinates.shape)
    if shape[1:] not in ((wanted[1], 3), (wanted[1], wanted[2], 3)) or shape[0] not in (1, wanted[0]):
        raise PolicyError(
            f"{name} returned coordinates {shape} in layer {layer}, but they must be (1 or {wanted[0]}, {wanted[1]}, "
            "3), or with an axis of heads before the last"
        )
