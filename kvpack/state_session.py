"""Memory of one generation by a `StateMemory`: a state for each layer, replaced as a whole at each commit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from kvpack.blocks import Span, grid_coordinates
from kvpack.errors import PolicyError
from kvpack.geometry import Geometry
from kvpack.ledger import Piece
from kvpack.memory import Attended, Chunk, StateMemory, Tokens, check_tokens
from kvpack.packed import Attention, PackedBuffer
from kvpack.rope import rotations, wide_dtype

KeysValues = tuple[Tensor, Tensor]
_BIAS_CHANNELS = 8  # kernels want head sizes that are multiples of it


@dataclass(frozen=True, eq=False)
class Past:
    """Everything committed so far.

    Args:
        frames: latent frames.
        chunks: chunks.
        states: state of each layer.
    """

    frames: int
    chunks: int
    states: tuple[Any, ...]


class StateLayer:
    """What an attention processor talks to, for a layer of a `StateSession`.

    Args:
        session: whose layer it is.
        index: index of the layer.
        buffer: what is attended.
    """

    def __init__(self, session: "StateSession", index: int, buffer: PackedBuffer) -> None:
        self.session, self.index, self.buffer = session, index, buffer
        #: Whether the coming forward settles what is attended, and whether its keys and values may become history.
        self.pending, self.listening = True, False
        self.attended: Attended | None = None
        self.heard: Chunk | None = None
        self.earlier: list[Tensor] = []
        self.chunk_turns: Tensor | None = None

    def attend(
        self,
        queries: Float[Tensor, "rows tokens heads head_dim"],
        keys: Float[Tensor, "rows tokens heads head_dim"],
        values: Float[Tensor, "rows tokens heads head_dim"],
        attention: Attention,
    ) -> Float[Tensor, "rows tokens heads head_dim"]:
        """Attention of the chunk to the memory and to itself; arguments as those of `LayerMemory.attend`."""
        session = self.session
        chunk = Chunk(
            queries,
            Tokens(keys, values, session.coordinates(queries.device)),
            self.index,
            session.past.chunks,
            session.frames,
            session.stack.chunk_frames,
            session.step,
            session.geometry,
            tuple(self.earlier),
        )
        if self.pending:
            self._fill(chunk)
        if self.listening:
            self.heard = chunk
        if session.stack.hears_queries:
            self.earlier.append(queries)
        assert self.attended is not None
        assert self.chunk_turns is not None
        return self.buffer.attend(queries, keys, values, self.chunk_turns, self._biased(self.attended, attention))

    def remembered(self) -> Any:
        """The state with the chunk in it."""
        if self.attended is None or self.heard is None:
            raise RuntimeError("finish_commit() must follow commit() and the forward of the chunk")
        return self.session.stack.remember(self.attended.state, self.heard)

    def _fill(self, chunk: Chunk) -> None:
        memory, like = self.session.stack, chunk.queries
        attended = memory.attend(self.session.past.states[self.index], chunk)
        if not isinstance(attended, Attended):
            raise PolicyError(
                f"{type(memory).__name__}.attend returned {type(attended).__name__} in layer {self.index}, "
                "but it must be Attended"
            )
        rows, geometry = like.shape[0], self.session.geometry
        for tokens in attended.tokens:
            check_tokens(memory, tokens, like, self.index)
        total = sum(map(len, attended.tokens))
        self.buffer.clear(rows, total + like.shape[1], like)
        for tokens in attended.tokens:
            if len(tokens):
                self.buffer.append(slice(0, rows), tokens.keys, tokens.values, turned(tokens.coordinates, geometry))
        moved = attended.chunk_start - chunk.first_frame
        self.chunk_turns = turned(chunk.tokens.moved(moved).coordinates, geometry)
        self.attended, self.pending = attended, False

    @staticmethod
    def _biased(attended: Attended, attention: Attention) -> Attention:
        if not any(tokens.bias for tokens in attended.tokens):
            return attention
        biases = [torch.full((len(tokens),), tokens.bias) for tokens in attended.tokens]
        return lambda queries, keys, values: biased(queries, keys, values, torch.cat(biases), attention)


class StateSession:
    """Memory of one generation; a chunk is as in `Session`.

    Args:
        stack: the memory.
        geometry: the model.
        buffer: what a layer attends.
    """

    def __init__(self, stack: StateMemory, geometry: Geometry, buffer: type[PackedBuffer] = PackedBuffer) -> None:
        self.stack, self.geometry, self.buffer = stack, geometry, buffer
        self.past = Past(0, 0, tuple(stack.start(geometry, layer) for layer in range(geometry.layers)))
        self.layers = [StateLayer(self, index, buffer()) for index in range(geometry.layers)]
        self.step = -1
        self._coordinates: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def frames(self) -> int:
        """Committed latent frames."""
        return self.past.frames

    def denoise(self, step: int) -> None:
        """Announces a denoising forward; step 0 settles anew what is attended. Never writes history."""
        for layer in self.layers:
            layer.pending = layer.pending or step == 0 or self.stack.every_step
            layer.listening = self.stack.commit == "last-step"
            if step == 0:
                layer.earlier = []
        self.step = step

    def commit(self, twins: Sequence[Piece] = ()) -> None:
        """Announces the forward of the clean chunk, whose keys and values become history."""
        self.step = -1
        for layer in self.layers:
            layer.pending, layer.listening = layer.pending or self.stack.every_step, True

    def twins_due(self) -> tuple[Piece, ...]:
        """Nothing is compressed in latent space."""
        return ()

    def compress(self, piece: Piece) -> None:
        """Nothing is compressed in latent space."""
        raise RuntimeError(f"{self.stack.name} makes no twins")

    def twin_span(self, piece: Piece) -> Span:
        """Nothing is compressed in latent space."""
        raise RuntimeError(f"{self.stack.name} makes no twins")

    def check_policies(self) -> None:
        """Raises `PolicyError` if the memory gave places or values that are not finite; waits for the device."""
        for layer in self.layers:
            for tokens in layer.attended.tokens if layer.attended else ():
                for what in ("keys", "values", "coordinates"):
                    if not bool(getattr(tokens, what).isfinite().all()):
                        name = type(self.stack).__name__
                        raise PolicyError(f"{name}.attend returned {what} for layer {layer.index} that are not finite")

    def finish_commit(self) -> None:
        """Writes the committed chunk into history.

        Raises:
            PolicyError: if the memory broke its contract in this chunk; history is then as it was.
        """
        self.adopt(self.prepared())

    def prepared(self) -> Past:
        """The past with the committed chunk in it; touches nothing that the present one uses."""
        self.check_policies()
        states = tuple(layer.remembered() for layer in self.layers)
        return Past(self.past.frames + self.stack.chunk_frames, self.past.chunks + 1, states)

    def adopt(self, past: Past) -> None:
        """Ends the chunk in progress."""
        self.past, self.step = past, -1
        for layer in self.layers:
            layer.pending, layer.listening, layer.heard, layer.earlier = True, False, None, []

    def context(self, layer: int) -> KeysValues:
        """Rotated keys and values of history that a layer attends for the chunk in progress, or attended last."""
        buffer = self.layers[layer].buffer
        longest = max(buffer.lengths, default=0)
        return buffer.keys[:, :longest], buffer.values[:, :longest]

    def snapshot(self) -> "StateSession":
        """An independent session at the last commit, to resume or to fork from."""
        copy = StateSession(self.stack, self.geometry, self.buffer)
        copy.past = self.past
        return copy

    def stats(self) -> dict[str, Any]:
        """Tokens and bytes of this session; keys as those of `Session.stats`."""
        lengths = self.layers[0].buffer.lengths
        buffers = [each for layer in self.layers for each in (layer.buffer.keys, layer.buffer.values)]
        stored = {id(each): each.nbytes for state in self.past.states for each in tensors(state)}
        attended = [kv for index in range(self.geometry.layers) for kv in self.context(index)]
        return {
            "stack": self.stack.name,
            "chunks": self.past.chunks,
            "frames": self.past.frames,
            "attended_tokens": max(lengths, default=0),
            "attended_bytes": sum(each.nbytes for each in attended),
            "archive_blocks": 0,
            "archive_bytes": 0,
            "resident_bytes": sum(each.nbytes for each in buffers) + sum(stored.values()),
            "selected": None,
        }

    def coordinates(self, device: torch.device) -> Float[Tensor, "1 tokens 3"]:
        """Where the tokens of the chunk in progress sit in the video."""
        key = self.frames, device
        if key not in self._coordinates:
            grid = grid_coordinates(self.stack.chunk_frames, self.geometry.grid).to(device, wide_dtype(device)).clone()
            grid[:, 0] += self.frames
            self._coordinates = {key: grid[None]}
        return self._coordinates[key]


def turned(coordinates: Tensor, geometry: Geometry) -> Tensor:
    """Rotations of tokens, or of each head's own tokens."""
    if coordinates.ndim == 3:
        return rotations(coordinates, geometry)
    return rotations(coordinates.flatten(1, 2), geometry).squeeze(2).unflatten(1, coordinates.shape[1:3])


def biased(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, attention: Attention) -> Tensor:
    """Attention with a number added to the logits of the first keys, exactly and without a mask.

    A channel is added in which every query is 1 and a key has its bias; the new head size is made up for.

    Args:
        queries: rotated queries.
        keys: rotated keys.
        values: values.
        bias: of the first keys; the rest have none.
        attention: scales by the root of the head size.
    """
    head_dim = queries.shape[-1]
    wide = head_dim + _BIAS_CHANNELS
    added = pad(bias.to(keys) * wide**0.5, (0, keys.shape[1] - bias.shape[0]))
    extra = pad(added[None, :, None, None].expand(*keys.shape[:3], 1), (0, _BIAS_CHANNELS - 1))
    ones = pad(torch.ones_like(queries[..., :1]), (0, _BIAS_CHANNELS - 1))
    scaled = queries * (wide / head_dim) ** 0.5
    out = attention(
        torch.cat([scaled, ones], dim=-1), torch.cat([keys, extra], dim=-1), pad(values, (0, _BIAS_CHANNELS))
    )
    return out[..., :head_dim]


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors(each)
    elif is_dataclass(value):
        for each in fields(value):
            yield from tensors(getattr(value, each.name))
