"""Memory of one generation by a `StateMemory`: a state for each layer, replaced as a whole at each commit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvpack.errors import PolicyError
from kvpack.memory.attribution import blamed
from kvpack.memory.base import Event, StateMemory
from kvpack.memory.blocks import Span, grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.memory.ledger import Piece, require_length
from kvpack.memory.rope import wide_dtype
from kvpack.memory.state_layer import StateLayer
from kvpack.memory.store import PackedBuffer

KeysValues = tuple[Tensor, Tensor]


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


class StateSession:
    """Memory of one generation; a chunk is as in `Session`.

    Args:
        stack: the memory.
        geometry: the model.
        buffer: what a layer attends.
    """

    def __init__(self, stack: StateMemory, geometry: Geometry, buffer: type[PackedBuffer] = PackedBuffer) -> None:
        self.stack, self.geometry, self.buffer = stack, geometry, buffer
        #: Seconds of the host inside the memory's own methods, by its class name.
        self.policy_seconds: dict[str, float] = {}
        with blamed(stack, "start", self.policy_seconds):
            self.past = Past(0, 0, tuple(stack.start(geometry, layer) for layer in range(geometry.layers)))
        self.layers = [StateLayer(self, index, buffer()) for index in range(geometry.layers)]
        self.step = -1
        #: Latent frames of the coming chunk, or of the one in progress, and its clean latents if this is its commit.
        self.coming_frames = stack.chunk_frames
        self.clean: Tensor | None = None
        self._retry: tuple[Any, ...] | None = None
        self._coordinates: dict[tuple[int, int, torch.device], Tensor] = {}

    @property
    def states(self) -> tuple[Any, ...]:
        """State of each layer, for the chunk in progress."""
        return self.past.states if self._retry is None else self._retry

    @property
    def frames(self) -> int:
        """Committed latent frames."""
        return self.past.frames

    def expect(self, frames: int) -> None:
        """Announces a chunk of so many latent frames, as `Session.expect` does."""
        self.adopt(self.past)
        self.coming_frames = require_length(frames, self.stack.chunk_frames)

    def denoise(self, step: int) -> None:
        """Announces a denoising forward; step 0 settles anew what is attended. Never writes history."""
        for layer in self.layers:
            layer.pending = layer.pending or step == 0 or self.stack.every_step
            layer.listening = self.stack.commit == "last-step"
            if step == 0:
                layer.earlier = []
        self.step = step

    def commit(self, twins: Sequence[Piece] = (), latents: Tensor | None = None) -> None:
        """Announces the forward of the clean chunk, whose keys and values become history."""
        self.step, self.clean = -1, latents
        self.coming_frames = self.coming_frames if latents is None else latents.shape[2]
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
        chunks = -(-self.coming_frames // self.stack.chunk_frames)
        return Past(self.past.frames + self.coming_frames, self.past.chunks + chunks, states)

    def adopt(self, past: Past) -> None:
        """Ends the chunk in progress."""
        self.past, self.step, self._retry = past, -1, None
        self.coming_frames, self.clean = self.stack.chunk_frames, None
        for layer in self.layers:
            layer.pending, layer.listening, layer.heard, layer.earlier = True, False, None, []

    def replays(self, coming: int = 0) -> tuple[int, ...]:
        """Frames of each forward of a replay, oldest first; arguments as those of `Session.replays`."""
        memory = self.stack
        frames = min(memory.replay_frames, self.frames + coming)
        if memory.replays_jointly:
            return (frames,) if frames else ()
        last = (coming,) if coming else ()
        return (memory.chunk_frames,) * ((frames - coming) // memory.chunk_frames) + last

    def rewind(self, frames: int) -> None:
        """Takes the last frames out of history; they must be committed again, one of `replays` after the other."""
        tokens = frames * self.geometry.tokens_per_frame
        with blamed(self.stack, "forget", self.policy_seconds):
            states = tuple(self.stack.forget(state, tokens) for state in self.past.states)
        chunks = -(-frames // self.stack.chunk_frames)
        self.adopt(Past(self.frames - frames, self.past.chunks - chunks, states))

    def tell(self, event: Event) -> None:
        """Lets the memory know what has happened between two chunks."""
        with blamed(self.stack, "happened", self.policy_seconds):
            states = tuple(self.stack.happened(state, event) for state in self.past.states)
        self.adopt(replace(self.past, states=states))

    def review(self, latents: Tensor) -> Bool[Tensor, " batch"] | None:
        """Rows of the chunk that must be generated anew, for which the memory is then ready; None if it is accepted."""
        if self.stack.most_retries:
            with blamed(self.stack, "veto", self.policy_seconds):
                rows, states = zip(*(self.stack.veto(state, latents) for state in self.past.states), strict=True)
            if bool(rows[0].any()):
                self._retry = states
                return rows[0]
        self.settle()
        return None

    def settle(self) -> None:
        """Ends the retries: the commit attends what the first try attended."""
        if self._retry is not None:
            self._retry = None
            for layer in self.layers:
                layer.pending = True

    def attended(self, layer: int) -> KeysValues:
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
        buffers = [each for layer in self.layers for each in (layer.buffer.keys, layer.buffer.values)]
        attended = [
            each[:, :1].nbytes * layer.denoised_tokens
            for layer in self.layers
            for each in (layer.buffer.keys, layer.buffer.values)
            if layer.denoised_tokens
        ]
        stored = {id(each): each.nbytes for state in self.past.states for each in tensors(state)}
        return {
            "stack": self.stack.name,
            "chunks": self.past.chunks,
            "frames": self.past.frames,
            "attended_tokens": self.layers[0].denoised_tokens,
            "attended_bytes": sum(attended),
            "archive_blocks": 0,
            "archive_bytes": 0,
            "resident_bytes": sum(each.nbytes for each in buffers) + sum(stored.values()),
            "selected": None,
            "policy_seconds": dict(self.policy_seconds),
        }

    def coordinates(self, device: torch.device) -> Float[Tensor, "1 tokens 3"]:
        """Where the tokens of the chunk in progress sit in the video."""
        key = self.frames, self.coming_frames, device
        if key not in self._coordinates:
            grid = grid_coordinates(self.coming_frames, self.geometry.grid).to(device, wide_dtype(device)).clone()
            grid[:, 0] += self.frames
            self._coordinates = {key: grid[None]}
        return self._coordinates[key]


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
