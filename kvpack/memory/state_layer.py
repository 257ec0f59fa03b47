"""The memory of one layer by a `StateMemory`: what an attention processor talks to."""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from kvpack.errors import PolicyError
from kvpack.memory.attribution import blamed
from kvpack.memory.base import Attended, Chunk, Tokens, check_tokens
from kvpack.memory.rope import rotations
from kvpack.memory.store import Attention, PackedBuffer

if TYPE_CHECKING:
    from kvpack.memory.state_session import StateSession

_BIAS_CHANNELS = 8  # kernels want head sizes that are multiples of it


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
        #: What is added to the logits of the attended tokens; None if nothing is.
        self.bias: Tensor | None = None
        #: Most tokens of history that a denoising forward of the last chunk attended; a commit may attend others.
        self.denoised_tokens = 0

    def attend(
        self,
        queries: Float[Tensor, "rows tokens heads head_dim"],
        keys: Float[Tensor, "rows tokens heads head_dim"],
        values: Float[Tensor, "rows tokens heads head_dim"],
        attention: Attention,
    ) -> Float[Tensor, "rows tokens heads head_dim"]:
        """Attention of the chunk to the memory and to itself; arguments as those of `LayerMemory.attend`."""
        if self.pending or self.listening:
            chunk = self._chunk(queries, keys, values)
            if self.pending:
                self._fill(chunk)
            if self.listening:
                self.heard = chunk
        if self.session.stack.hears_queries:
            self.earlier.append(queries)
        assert self.attended is not None
        assert self.chunk_turns is not None
        keys, values = keys[:, self.attended.hidden :], values[:, self.attended.hidden :]
        if self.bias is not None:
            attention = partial(biased, bias=self.bias, attention=attention)
        return self.buffer.attend(queries, keys, values, self.chunk_turns, attention)

    def remembered(self) -> Any:
        """The state with the chunk in it."""
        if self.attended is None or self.heard is None:
            raise RuntimeError("finish_commit() must follow commit() and the forward of the chunk")
        with blamed(self.session.stack, "remember", self.session.policy_seconds, self.index):
            return self.session.stack.remember(self.attended.state, self.heard)

    def _chunk(self, queries: Tensor, keys: Tensor, values: Tensor) -> Chunk:
        session = self.session
        return Chunk(
            queries,
            Tokens(keys, values, session.coordinates(queries.device)),
            self.index,
            session.past.chunks,
            session.frames,
            session.coming_frames,
            session.step,
            session.geometry,
            tuple(self.earlier),
            session.clean,
        )

    def _fill(self, chunk: Chunk) -> None:
        memory, like = self.session.stack, chunk.queries
        with blamed(memory, "attend", self.session.policy_seconds, self.index):
            attended = memory.attend(self.session.states[self.index], chunk)
        if not isinstance(attended, Attended):
            raise PolicyError(
                f"{type(memory).__name__}.attend returned {type(attended).__name__} in layer {self.index}, "
                "but it must be Attended"
            )
        start = attended.chunk_start
        if not isinstance(attended.tokens, tuple) or not isinstance(start, int | float) or not math.isfinite(start):
            raise PolicyError(
                f"{type(memory).__name__}.attend returned {type(attended.tokens).__name__} and chunk_start {start!r} "
                f"in layer {self.index}, but they must be a tuple of Tokens and a finite number"
            )
        rows, geometry = like.shape[0], self.session.geometry
        for tokens in attended.tokens:
            check_tokens(memory, tokens, like, self.index)
        total = sum(map(len, attended.tokens))
        self.buffer.clear(rows, total + like.shape[1], like)
        for tokens in attended.tokens:
            if len(tokens):
                self.buffer.append(slice(0, rows), tokens.keys, tokens.values, rotations(tokens.coordinates, geometry))
        moved = attended.chunk_start - chunk.first_frame
        self.chunk_turns = rotations(chunk.tokens.moved(moved).coordinates, geometry)
        biases = [like.new_full((len(tokens),), tokens.bias) for tokens in attended.tokens]
        self.bias = torch.cat(biases) if any(tokens.bias for tokens in attended.tokens) else None
        self.attended, self.pending = attended, False
        if self.session.step >= 0:
            self.denoised_tokens = max(total, self.denoised_tokens if self.session.step else 0)


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
