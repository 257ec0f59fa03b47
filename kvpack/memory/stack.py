"""The memory of four small policies: what is kept whole, how the rest is compressed, which of it is attended, where."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from kvpack.errors import InvalidOptionError, PolicyError, require_bool, require_choice, require_int
from kvpack.memory.archive import Archive, Encoded
from kvpack.memory.attribution import broken, policy_call
from kvpack.memory.base import Attended, Chunk, Commit, Memory
from kvpack.memory.blocks import KVBlock, Span, check_block, grid_coordinates
from kvpack.memory.choice import check_choice, choose
from kvpack.memory.codec import DENSE, Codec, Tier, stored_bytes
from kvpack.memory.eviction import Eviction
from kvpack.memory.geometry import Geometry
from kvpack.memory.ledger import BlockEntry, Ledger
from kvpack.memory.plan import Book, Plan
from kvpack.memory.policy import Policy, named
from kvpack.memory.roles import Compressor, LatentCompressor, Partitioner, Places, Reindexer, Selector
from kvpack.memory.sharded import with_all_heads, with_own_heads
from kvpack.memory.stack_plan import StackBook, StackPlan
from kvpack.memory.stack_state import KeptBlock, StackState, attended_tokens, merged_block, new_blocks, with_places

ROLES: dict[str, type[Policy]] = {
    "partitioner": Partitioner,
    "compressor": Compressor,
    "selector": Selector,
    "reindexer": Reindexer,
}

#: Tokens of all layers that are compressed together: 200 MB of float32 at 1,536 channels, which a forward takes too.
_TOGETHER = 32_768


@dataclass(frozen=True)
class Stack(Memory):
    """The four roles under a name.

    Args:
        name: what `stats()` and tables call it.
        partitioner: what of the history is kept whole, compressed or dropped.
        compressor: how mid blocks get smaller.
        selector: which mid blocks a chunk attends.
        reindexer: temporal positions of everything attended.
        chunk_frames: latent frames generated together; the length that the model was trained with.
        archive_blocks: most compressed blocks kept, so that memory is bounded; None keeps all.
        share_selection: whether the first layer chooses mid blocks for all layers, instead of each its own; for each
            batch row either way.
        commit: which keys and values of a chunk become history: those of a "rerun" of the clean chunk at t = 0, or
            those of the "last-step" of denoising, which saves a forward but keeps what is left of its noise.
        replay_frames: last latent frames that are computed anew under a new prompt, as far as they are still whole.
        store: in what form compressed blocks are archived.
        tier: where they are archived: on the "device" of the model, in the memory of the "host", or on "disk".
        eviction: which blocks leave a full archive: the "oldest", such that the rest are "spread" over all the past, or
            the "least-selected"; or, "merged", which two become one (see `eviction.py`).

    Raises:
        InvalidOptionError: if a size or word is wrong, a policy is in the wrong role, or the roles do not fit together.
    """

    name: str  # type: ignore[misc]  # a memory's is its class's
    partitioner: Partitioner
    compressor: Compressor
    selector: Selector
    reindexer: Reindexer
    chunk_frames: int = 4
    archive_blocks: int | None = 128
    share_selection: bool = False
    commit: Commit = "rerun"  # type: ignore[misc]
    replay_frames: int = 21
    store: Codec = DENSE
    tier: Tier = "device"
    eviction: Eviction = "oldest"

    def __post_init__(self) -> None:
        for role, base in (ROLES | {"store": Codec}).items():
            policy = getattr(self, role)
            if not isinstance(policy, base):
                raise InvalidOptionError(f"{role} must be a {base.__name__}, got {policy!r}")
            named(policy)
        require_choice(f"places of {self.compressor.name}", self.compressor.places, get_args(Places))
        require_int("chunk_frames", self.chunk_frames, minimum=1)
        if self.archive_blocks is not None:
            require_int("archive_blocks", self.archive_blocks)
        require_int("replay_frames", self.replay_frames)
        require_choice("tier", self.tier, get_args(Tier))
        require_choice("eviction", self.eviction, get_args(Eviction))
        if self.eviction == "merged" and not self.compressor.merges:
            raise InvalidOptionError(
                f"blocks of compressor {self.compressor.name} cannot be merged; give another eviction"
            )
        try:
            hash(self.store)  # its form is computed once
        except TypeError as error:
            raise InvalidOptionError(f"store must be frozen data, got {self.store!r}: {error}; use tuples") from error
        require_bool("share_selection", self.share_selection)
        require_choice("commit", self.commit, get_args(Commit))
        self.partitioner.check(self.chunk_frames)
        self.reindexer.check(self.partitioner, self.chunk_frames)

    composite = in_place = True

    @property
    def latent_compressor(self) -> LatentCompressor | None:
        """The compressor, if it works on latents."""
        return self.compressor if isinstance(self.compressor, LatentCompressor) else None

    @property
    def committed_queries(self) -> int:
        """As many as the compressor looks at."""
        return self.compressor.max_queries

    @cached_property
    def keeps_rotated(self) -> bool:  # type: ignore[override]
        """Whether keys are kept after RoPE: positions never change, and nothing is compressed."""
        return self.reindexer.absolute and not self.archives

    @cached_property
    def archives(self) -> bool:
        """Whether any block is ever compressed and kept."""
        far = self.partitioner.horizon_frames // self.chunk_frames + 2
        lengths = range(self.chunk_frames, (far + 1) * self.chunk_frames, self.chunk_frames)
        parts = (self.partitioner.partition(history, self.chunk_frames) for history in lengths)
        return self.archive_blocks != 0 and any(each.part == "mid" for segments in parts for each in segments)

    def ledger(self) -> Ledger:
        """Return an empty ledger."""
        return Ledger(self.partitioner, self.chunk_frames, self.archive_blocks, self.eviction)

    def book(self) -> StackBook:
        """Return the book of an empty ledger."""
        return StackBook.of(self.ledger())

    def plan(self, book: Book, coming: int, geometry: Geometry) -> StackPlan:
        """List the attended blocks."""
        assert isinstance(book, StackBook)
        return StackPlan(self, book, coming, geometry)

    def committed(self, plan: Plan, selected: Sequence[Tensor] = ()) -> StackBook:
        """Return the book with the planned chunk in it."""
        assert isinstance(plan, StackPlan)
        # A replayed chunk was counted when it was made.
        counts = self.eviction == "least-selected" and selected and plan.aim is None
        return plan.counted(selected) if counts else plan.after

    def rewound(self, book: Book, frames: int) -> StackBook:
        """Return the book without its last frames; what has left the recent ones since does not come back."""
        assert isinstance(book, StackBook)
        return StackBook.of(book.ledger.rewound(frames), book.ledger)

    def replays(self, book: Book, coming: int = 0) -> tuple[int, ...]:
        """Return the frames of each of the last chunks that is still whole."""
        assert isinstance(book, StackBook)
        return book.ledger.replayable(self.replay_frames)

    def start(self, geometry: Geometry, layer: int) -> StackState:
        """Return an empty archive, whose slots hold the longest block."""
        # Of all lengths: a shorter chunk need not have fewer tokens.
        spans = [self.compressor.span(0, frames, geometry.grid) for frames in range(1, self.chunk_frames + 1)]
        for span in spans:
            if not isinstance(span, Span):
                raise broken(self.compressor, "span", type(span).__name__, "it must be a Span")
        stored_bytes(self.store, 1, geometry.heads, geometry.head_dim, geometry.dtype)  # refuses heads that do not fit
        return StackState((), Archive(max(span.tokens for span in spans), self.store, self.tier))

    def attend(self, state: StackState, chunk: Chunk) -> Attended:
        """Choose mid blocks and place them between sink and recent blocks."""
        plan, rows = chunk.plan, chunk.queries.shape[0]
        if not isinstance(plan, StackPlan):
            raise PolicyError(f"{self.name} is a Stack, which is no part of another memory; use its policies instead")
        chosen = choose(self.selector, state.archive, chunk, plan)
        if chosen is None or plan.uniform:
            return attended_tokens(state, plan, slice(0, rows), chosen, chunk, chosen)
        # Chosen blocks of unequal size: rows differ in length; the host reads each one's choice.
        each = [
            attended_tokens(state, plan, slice(row, row + 1), blocks, chunk, chosen)
            for row, blocks in enumerate(chosen.tolist())
        ]
        starts = torch.cat([attended.chunk_start for attended in each if isinstance(attended.chunk_start, Tensor)])
        tokens = [attended.tokens for attended in each if isinstance(attended.tokens, tuple)]
        doubts = torch.stack([attended.suspect for attended in each if attended.suspect is not None])
        # Each row has places of its own, so that layers share no rotations.
        return replace(each[0], tokens=tokens, chunk_start=starts, rotations=None, suspect=doubts.any())

    def remember(self, state: StackState, chunk: Chunk) -> StackState:
        """Keep the clean chunk whole, and compress what leaves the recent blocks."""
        (remembered,) = self.remember_all([(state, chunk)])
        return remembered

    def remember_all(self, committed: Iterable[tuple[StackState, Chunk]]) -> tuple[StackState, ...]:
        """Do as `remember` for all layers, of which a few compress their blocks together."""
        states, chunks = zip(*committed, strict=True)
        plan, count = chunks[0].plan, len(chunks)
        assert isinstance(plan, StackPlan)
        wholes = [(*state.whole, *new_blocks(chunk, plan)) for state, chunk in zip(states, chunks, strict=True)]
        pieces = (*plan.ledger.whole, *plan.new_pieces)
        # Of each layer; written by `written` only, since a slot may still hold a block of the past before.
        leaving: list[list[tuple[int, Encoded]]] = [[] for _ in chunks]
        for i, slot in plan.step.leaving:
            together = max(1, _TOGETHER // (len(chunks[0].queries) * wholes[0][i].block.tokens))
            for some in (slice(first, first + together) for first in range(0, count, together)):
                blocks = self._compressed(pieces[i], [whole[i] for whole in wholes[some]], chunks[some])
                for block, state, chunk, mine in zip(blocks, states[some], chunks[some], leaving[some], strict=True):
                    # What may run out of memory does so before anything is written.
                    mine.append((slot, self._encoded(block, slot, state.archive, chunk)))
        return tuple(
            StackState(
                tuple(whole[i] for i in plan.step.kept),
                state.archive,
                state.tokens + len(chunk.tokens),
                (*self._merged(state, chunk, plan), *mine),  # in this order, for a merged block may be views of slots
            )
            for state, chunk, whole, mine in zip(states, chunks, wholes, leaving, strict=True)
        )

    def written(self, state: StackState) -> StackState:
        """Put blocks into slots, of which nothing of the past before is needed any more."""
        for slot, block in state.leaving:
            state.archive.write(slot, block)
        # The same object if there was nothing to write: `Session.adopt` goes by it.
        return replace(state, leaving=()) if state.leaving else state

    def forget(self, state: StackState, tokens: int) -> StackState:
        """Return the state without the last tokens; archived blocks stay."""
        left = state.tokens - tokens
        return replace(state, whole=tuple(kept for kept in state.whole if kept.first_token < left), tokens=left)

    def fork(self, state: StackState) -> StackState:
        """Return a state whose archive is its own once it is written."""
        return replace(state, archive=state.archive.fork())

    def explain(self, attended: Attended, plan: Plan, layer: int) -> None:
        """Raise `PolicyError` if the choice or the placement was wrong."""
        parts = attended.tokens if isinstance(attended.tokens, list) else [attended.tokens]
        numbers = [torch.as_tensor(attended.chunk_start), *(each.coordinates for row in parts for each in row)]
        if not all(bool(each.isfinite().all()) for each in numbers):
            name = type(self.reindexer).__name__
            raise PolicyError(f"{name}.place returned positions for layer {layer} that are not finite")
        assert isinstance(plan, StackPlan)
        check_choice(self.selector, attended.selected, len(plan.mid), layer)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON takes it; `stack_from_dict` reads it back.

        Raises:
            InvalidOptionError: if a policy is not a dataclass, or holds a module.
        """
        roles = {role: getattr(self, role).to_dict() for role in ROLES}
        named = ("name", "store", *ROLES)
        others = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in named}
        return {"name": self.name, **roles, **others, "store": self.store.to_dict()}

    def _compressed(self, piece: BlockEntry, kept: Sequence[KeptBlock], chunks: Sequence[Chunk]) -> list[KVBlock]:
        """Return what will stand for a block, in each of some layers."""
        compressor, geometry, frames = self.compressor, chunks[0].geometry, piece.frames
        span = compressor.span(piece.first_frame, frames, geometry.grid)
        # Made at the chunk's own commit (paper's dual-resolution shifting): nothing is computed when it leaves.
        twins = [KVBlock(*each.twin, span) for each in kept if each.twin is not None]
        whole = Span(piece.first_frame, frames, grid_coordinates(frames, geometry.grid))
        queries = [chunk.queries if compressor.max_queries else None for chunk in chunks]
        seen = twins or [
            with_all_heads(compressor, geometry, KVBlock(*each.block.resolved(), whole, some, chunk.layer))
            for each, some, chunk in zip(kept, queries, chunks, strict=True)
        ]
        blocks = twins
        if not twins:
            assert isinstance(chunks[0].plan, StackPlan)
            with policy_call(compressor, "compress", chunks[0].plan.ledger.seconds):
                blocks = compressor.compress_all(seen, geometry.grid)
            if not isinstance(blocks, list | tuple) or len(blocks) != len(seen):
                found = f"{len(blocks)} blocks" if isinstance(blocks, list | tuple) else type(blocks).__name__
                found += f" for {len(seen)} layers"
                raise broken(compressor, "compress_all", found, "it must be a list of blocks")
        for block, given, chunk in zip(blocks, seen, chunks, strict=True):
            check_block(compressor, block, span, given.keys, chunk.layer)
        if not twins:
            blocks = [with_own_heads(compressor, geometry, block) for block in blocks]
        # Merged blocks have places of their own, and an archive has them for all slots or for none.
        return list(map(with_places, blocks)) if self.eviction == "merged" else blocks

    def _merged(self, state: StackState, chunk: Chunk, plan: StackPlan) -> Iterator[tuple[int, Encoded]]:
        """Yield what archived blocks become that are merged, with the slot of each."""
        for pieces in plan.step.merged:
            slot, archive = pieces[0].slot, state.archive
            yield slot, self._encoded(merged_block(self.compressor, pieces, archive, chunk), slot, archive, chunk)

    def _encoded(self, block: KVBlock, slot: int, archive: Archive, chunk: Chunk) -> Encoded:
        """Return a block as its slot will hold it, for which there is room then."""
        assert isinstance(chunk.plan, StackPlan)
        slots = chunk.plan.ledger.slots(archive.slots, slot, chunk.geometry.frames)
        archive.reserve(slots, block.keys, block.own_places)
        with policy_call(self.store, "encode", chunk.plan.book.seconds, chunk.layer):
            return archive.encoded(block.keys, block.values, block.own_places)
