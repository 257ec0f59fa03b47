"""The memory of one transformer layer in one generation: what an attention processor talks to."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable
from weakref import ref

import torch
from jaxtyping import Float
from torch import Tensor

from kvpack.memory.attended import Attention, Context, Gathered, InPlace
from kvpack.memory.attribution import memory_call
from kvpack.memory.base import Attended, Chunk, Memory
from kvpack.memory.checks import check_attended, signs
from kvpack.memory.ledger import BlockEntry
from kvpack.memory.plan import Plan, at
from kvpack.memory.rope import rotations, wide_dtype
from kvpack.memory.store import Arena, KeysValues, Workspace
from kvpack.memory.tokens import Tokens


@runtime_checkable
class AttendingLayer(Protocol):
    """What an attention processor talks to."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        """Return the attention of the current tokens to the memory and to themselves."""
        ...


@dataclass(frozen=True, eq=False)
class Forward:
    """What the coming forward is; each layer is told by the object that it is handed.

    Args:
        plan: the chunk.
        first: the first layer, whose choice others may share.
        settled: what is attended is settled once for all forwards that share this.
        states: state of each layer before the chunk.
        step: denoising step; -1 in a forward of clean tokens.
        captures: whether its keys and values may become history.
        with_chunk: whether its first tokens are the chunk's.
        twins: pieces whose twins' tokens follow.
        places: (t, y, x) of each twin's tokens, t from the chunk's first frame.
        latents: the clean chunk, in the forward of it.
    """

    plan: Plan
    first: "LayerCache"
    settled: object
    states: tuple[Any, ...]
    step: int = -1
    captures: bool = False
    with_chunk: bool = True
    twins: tuple[BlockEntry, ...] = ()
    places: tuple[Tensor, ...] = ()
    latents: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of it, on all processes."""
        chunk = self.plan.coming * self.plan.geometry.tokens_per_frame if self.with_chunk else 0
        return chunk + sum(each.shape[0] for each in self.places)


@dataclass
class LayerCache:
    """What one layer holds beside its state: the arena, and the chunk in progress.

    Args:
        memory: the policy.
        index: index of the layer.
        workspace: shared by all layers.
        arena: where blocks lie that the engine stores.
    """

    #: Whether gradients pass; not through memory that is written in place.
    differentiable: ClassVar[bool] = False

    memory: Memory
    index: int
    workspace: Workspace
    arena: Arena = field(default_factory=Arena)
    #: What is attended, and since when.
    attended: Attended | None = None
    context: Context | None = None
    _settled: object = None
    #: The chunk that may become history, keys and values of twins, and queries of earlier forwards.
    captured: Chunk | None = None
    twins: dict[BlockEntry, KeysValues] = field(default_factory=dict)
    earlier: tuple[Tensor, ...] = ()
    #: Scalars on the device, of which one is not finite if something is wrong with what was attended.
    signs: list[Tensor] = field(default_factory=list)
    #: Tokens of history of each row in the last denoising steps; the choice of the last chunk.
    lengths: list[int] = field(default_factory=list)
    selected: Tensor | None = None

    def __post_init__(self) -> None:
        self.arena.owner = ref(self)  # weak, so that `vacate` sees when the layer is gone

    def attend(
        self,
        forward: Forward,
        queries: Float[Tensor, "rows tokens heads head_dim"],
        keys: Float[Tensor, "rows tokens heads head_dim"],
        values: Float[Tensor, "rows tokens heads head_dim"],
        attention: Attention,
    ) -> Float[Tensor, "rows tokens heads head_dim"]:
        """Return the attention of the chunk, and of each twin's tokens, to the memory and to themselves.

        Args:
            forward: what this forward is.
            queries: queries after their norm and before RoPE.
            keys: keys after their norm and before RoPE.
            values: values.
            attention: called with rotated queries, and with keys and values of history and current tokens.
        """
        # By identity: a new object asks for it anew. A twin's own forward attends what the commit has settled.
        if forward.with_chunk and self._settled is not forward.settled:
            count = queries.shape[1] - sum(each.shape[0] for each in forward.places)
            # All queries of the forward choose, those of twins too.
            self._settle(forward, self._chunk(forward, queries, keys[:, :count], values[:, :count]))
        if not forward.twins:
            return self._attend_chunk(forward, queries, keys, values, attention)
        sizes = [each.shape[0] for each in forward.places]
        if forward.with_chunk:
            sizes.insert(0, queries.shape[1] - sum(sizes))
        parts = list(zip(*(each.split(sizes, dim=1) for each in (queries, keys, values)), strict=True))
        out = []
        if forward.with_chunk:
            query, key, value = parts.pop(0)
            out.append(self._attend_chunk(forward, query, key, value, attention))
        for piece, places, projected in zip(forward.twins, forward.places, parts, strict=True):
            out.append(self._attend_twin(forward.plan, piece, places, projected, attention))
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    @property
    def leaves(self) -> tuple["LayerCache", ...]:
        """What holds the layer's keys and values."""
        return (self,)

    def history(self) -> KeysValues:
        """Return rotated keys, and values, of history; see `Session.attended`."""
        if self.context is None:
            raise RuntimeError("a layer attends something from a chunk's first forward to its commit; ask in between")
        return self.context.history()

    def explain(self, plan: Plan) -> None:
        """Raise `PolicyError` if what was attended breaks the contract; waits for the device."""
        if self.attended is not None:
            self.memory.explain(self.attended, plan, self.index)

    def clear(self) -> None:
        """End the chunk in progress."""
        self._settled = self.attended = self.context = self.captured = None
        # `lengths` and `selected` stay, since `stats` is asked between chunks.
        self.twins, self.earlier, self.signs = {}, (), []
        self.workspace.owner = None  # it would keep alive what was attended

    def committed(self) -> tuple[Any, Chunk]:
        """Return the state that the chunk attended, and the chunk that becomes history."""
        if self.attended is None or self.captured is None:
            raise RuntimeError("finish_commit() must follow commit() and the forward of the chunk")
        # Twins that have a forward of their own come behind the capture.
        return self.attended.state, replace(self.captured, twins=self.twins)

    def _attend_chunk(
        self, forward: Forward, queries: Tensor, keys: Tensor, values: Tensor, attention: Attention
    ) -> Tensor:
        assert self.attended is not None
        assert self.context is not None
        hidden, turns = self.attended.hidden, forward.plan.chunk_rotations(self.attended.chunk_start, queries.device)
        out = self.context.attend(queries, keys[:, hidden:], values[:, hidden:], turns, attention)
        if forward.captures:  # behind `attend`, which puts the values where `keep` finds them
            self._capture(self._chunk(forward, queries, keys, values))
        if self.memory.needs_queries:  # behind the capture: `earlier` are the forwards before this one
            self.earlier = (*self.earlier, queries)
        return out

    def _capture(self, chunk: Chunk) -> None:
        """Keep what may become history; tensors of the model are let go where the engine stores blocks."""
        assert self.context is not None
        tokens = chunk.tokens
        block = self.context.keep(tokens.keys, tokens.values)
        if block is not None:
            stored = Tokens(block.keys, block.values, tokens.coordinates, block=block)
            queries, most = chunk.queries, self.memory.committed_queries
            some = queries[:, :: -(-queries.shape[1] // most)] if most else queries[:, :0]  # spread evenly
            chunk = replace(chunk, tokens=stored, queries=some.clone())  # a view would keep all queries
        self.captured = chunk

    def _attend_twin(
        self,
        plan: Plan,
        piece: BlockEntry,
        places: Tensor,
        projected: tuple[Tensor, Tensor, Tensor],
        attention: Attention,
    ) -> Tensor:
        assert self.attended is not None
        assert self.context is not None
        queries, keys, values = projected
        start = self.attended.chunk_start
        if not isinstance(start, Tensor):
            start = torch.full((1,), float(start), dtype=wide_dtype(queries.device), device=queries.device)
        # At a ratio of 1, as the chunk: a re-indexer squeezes neither.
        turns = rotations(at(places, start, torch.ones_like(start)), plan.geometry)
        self.twins[piece] = keys.clone(), values.clone()  # the forward's own tensors are far larger
        with self.context.beside(keys.shape[1]):
            return self.context.attend(queries, keys, values, turns, attention)

    def _chunk(self, forward: Forward, queries: Tensor, keys: Tensor, values: Tensor) -> Chunk:
        plan, first = forward.plan, forward.first
        return Chunk(
            queries,
            Tokens(keys, values, plan.coordinates(queries.device)),
            self.index,
            plan.book.chunks,
            plan.book.frames,
            plan.coming,
            forward.step,
            plan.geometry,
            self.earlier,
            forward.latents,
            plan,
            None if self is first or first.attended is None else first.attended.shared,
        )

    def _settle(self, forward: Forward, chunk: Chunk) -> None:
        """Ask the memory what is attended, and lay it out."""
        memory, plan, like = self.memory, forward.plan, chunk.tokens.keys
        with memory_call(memory, "attend", plan.book.seconds, self.index):
            attended = memory.attend(forward.states[self.index], chunk)
        # Behind `attend`: the next layer will ask its archive for the slots that this one has asked for.
        plan.prefetch(next(iter(forward.states[self.index + 1 :]), None))
        check_attended(memory, attended, like, self.index)
        self.context = self._laid_out(attended, like, plan)
        # What a policy makes by itself may hold anything, and costs a pass to look at.
        self.signs = [] if memory.in_place else signs(attended)
        if memory.in_place and isinstance(attended.tokens, tuple):  # they lie in the arena now
            # Not `like[:, :0]`, which would keep the forward's keys alive.
            nothing = like.new_empty(like.shape[0], 0, *like.shape[2:])
            places = tuple(Tokens(nothing, nothing, each.coordinates) for each in attended.tokens)
            attended = replace(attended, tokens=places)
        # Lengths are those of denoising: with `every_step` the commit may attend something else.
        begins = self.attended is None and forward.step >= 0
        if memory.in_place or begins or not self.lengths:
            self.lengths = self.context.lengths
        elif forward.step > 0:
            # With `every_step`, the most that any step has attended.
            self.lengths = list(map(max, self.lengths, self.context.lengths))
        self.attended, self._settled, self.selected = attended, forward.settled, attended.selected

    def _laid_out(self, attended: Attended, like: Tensor, plan: Plan) -> Context:
        memory = self.memory
        # A list is rows of unlike numbers, which no one tensor holds.
        if memory.in_place and isinstance(attended.tokens, tuple):
            rotated = memory.keeps_rotated
            return InPlace(self.arena, self.workspace, attended, like, plan, rotated=rotated)
        return Gathered(self.workspace, attended, like, plan.geometry, stores=memory.in_place)


@dataclass(frozen=True, eq=False)
class ForwardLayer:
    """A layer in one forward, which knows what that forward is."""

    cache: LayerCache
    forward: Forward

    @property
    def differentiable(self) -> bool:
        """Whether gradients pass."""
        return self.cache.differentiable

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        """Return the attention of the forward's tokens; arguments as those of `LayerCache.attend`."""
        return self.cache.attend(self.forward, queries, keys, values, attention)

    def capture(self, keys: Tensor, values: Tensor) -> None:
        """Keep the keys before RoPE and values of the one twin that this forward is for."""
        (piece,) = self.forward.twins
        self.cache.twins[piece] = keys, values
