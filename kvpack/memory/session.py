"""All memory of one generation and guidance branch: the only mutable thing."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from kvpack.memory.accounting import session_stats
from kvpack.memory.attribution import memory_call
from kvpack.memory.base import Chunk, Event, Memory
from kvpack.memory.blocks import Span
from kvpack.memory.checks import check_layers, vetoes
from kvpack.memory.divided import Divided
from kvpack.memory.divided_layer import divided_layers
from kvpack.memory.geometry import Geometry
from kvpack.memory.layer import Forward, ForwardLayer, LayerCache
from kvpack.memory.ledger import BlockEntry, require_length
from kvpack.memory.plan import Book, Plan
from kvpack.memory.roles import LatentCompressor
from kvpack.memory.shard import agreed
from kvpack.memory.stack_plan import StackPlan
from kvpack.memory.store import KeysValues, Workspace


@dataclass(frozen=True, eq=False)
class Past:
    """Everything committed so far; replaced as a whole, so that a commit is all or nothing.

    Args:
        book: the past in host integers.
        states: the state of each layer: frozen dataclasses, numbers, tensors and handles of blocks.
    """

    book: Book
    states: tuple[Any, ...]


class Session:
    """Memory of one generation.

    A chunk is: `denoise(step)` before each denoising forward, `commit()` before the forward of the clean chunk, and
    `finish_commit()`. Only the last one writes history; until then the chunk can be done again. Each of the first two
    returns the layers of its forward. A memory whose `commit` is "last-step" needs no `commit()`: the last denoising
    forward is kept. A chunk shorter than the rest is announced by `expect(frames)`. Of a latent-space compressor, the
    tokens of `pending_compressions()` ride in the commit's forward, or each has one of its own after `compress(piece)`.

    Args:
        memory: the policy.
        geometry: the model.
        state: where to go on from, as `state()` gave it; None begins a video.
        layer: what a layer is made of; `GraphLayer` lets gradients through.
    """

    def __init__(
        self, memory: Memory, geometry: Geometry, state: Past | None = None, layer: type[LayerCache] = LayerCache
    ) -> None:
        self.stack, self.geometry = memory, geometry
        self.workspace, self._layer = Workspace(), layer
        if isinstance(memory, Divided):
            self.caches = divided_layers(memory, geometry, layer)
        else:
            self.caches = [layer(memory, index, self.workspace) for index in range(geometry.layers)]
        #: What is known of the chunk in progress, and its denoising step; -1 in a commit and before the first.
        self.plan: Plan | None = None
        self.step = -1
        self._settled: object = None
        self._expected: int | None = None
        self._retry: tuple[Any, ...] | None = None
        #: The layers in the forward that was announced last.
        self.layers: tuple[ForwardLayer, ...] = ()
        self.past = self._begun() if state is None else state

    def _begun(self) -> Past:
        book, geometry = self.stack.book(), self.geometry
        with memory_call(self.stack, "start", book.seconds):
            return Past(book, tuple(self.stack.start(geometry, layer) for layer in range(geometry.layers)))

    @property
    def frames(self) -> int:
        """Committed latent frames."""
        return self.past.book.frames

    @property
    def policy_seconds(self) -> dict[str, float]:
        """Seconds of the host inside each policy's own methods, by its class name."""
        return self.past.book.seconds

    @property
    def coming_frames(self) -> int:
        """Latent frames of the coming chunk, or of the one in progress."""
        if self.plan is not None:
            return self.plan.coming
        return self.stack.chunk_frames if self._expected is None else self._expected

    def expect(self, frames: int) -> None:
        """Announce a chunk of so many latent frames: at most a chunk, and less only for a video's first or last."""
        self.adopt(self.past)
        self._expected = require_length(frames, self.stack.chunk_frames)

    def denoise(self, step: int) -> tuple[ForwardLayer, ...]:
        """Announce a denoising forward; step 0, or else a chunk's first, chooses and places the history anew.

        Never writes history.
        """
        if step == 0 or self.plan is None:  # the second of two experts begins at a later step
            self._make_plan(self.coming_frames)
            for cache in self.caches:
                cache.clear()
        elif self.stack.every_step:
            self._settled = object()  # a new object: layers settle anew
        self.step = step
        return self._announce(step=step, captures=self.stack.commit == "last-step")  # the last one stays

    def commit(self, twins: Sequence[BlockEntry] = (), latents: Tensor | None = None) -> tuple[ForwardLayer, ...]:
        """Announce the forward of the clean chunk, whose keys and values become history.

        Args:
            twins: pieces whose twins' tokens follow the chunk's in the forward.
            latents: the clean chunk; of a replay that is one forward, all its chunks.
        """
        if self.plan is None:
            self._make_plan(self.coming_frames if latents is None else latents.shape[2])
        elif self.stack.every_step:  # the commit is a step, too
            self._settled = object()
        self.step = -1
        return self._announce(captures=True, latents=latents, twins=tuple(twins))

    def compress(self, piece: BlockEntry) -> tuple[ForwardLayer, ...]:
        """Announce the forward of a twin's tokens, in the context that the commit saw; follows the commit's."""
        return self._announce(with_chunk=False, twins=(piece,))

    def pending_compressions(self) -> tuple[BlockEntry, ...]:
        """Return the pieces of the coming chunk that a latent-space compressor must make twins of."""
        if self.stack.latent_compressor is None:
            return ()
        plan = self.plan or self.stack.plan(self.past.book, self.coming_frames, self.geometry)
        assert isinstance(plan, StackPlan)
        return plan.ledger.compressed_pieces()

    def twin_span(self, piece: BlockEntry) -> Span:
        """Return the tokens that will stand for a piece; their times count from the chunk's first frame."""
        compressor = self.stack.latent_compressor
        assert isinstance(compressor, LatentCompressor)
        span = compressor.span(piece.first_frame, piece.frames, self.geometry.grid)
        offset = torch.tensor([float(piece.first_frame - self.frames), 0.0, 0.0])
        return replace(span, coordinates=span.coordinates + offset)

    def check_policies(self) -> None:
        """Raise `PolicyError` if a policy broke its contract in the chunk in progress; waits for the device."""
        shard = self.geometry.shard
        # What one rank alone finds broken ends all of them, or they would wait for it.
        with nullcontext() if shard is None else shard.together():
            for cache in self.caches:
                if self.plan is not None:
                    cache.explain(self.plan)

    def finish_commit(self) -> None:
        """Write the committed chunk into history, and compress what leaves the recent frames.

        Raises:
            PolicyError: if a policy broke its contract in this chunk; history is then as it was.
        """
        finish_commits([self])

    def prepared(self) -> Past:
        """Return the past with the committed chunk in it; touches nothing that the present one uses."""
        # Last where nothing is let go of, since it waits for the device, which has its work by then; but before what
        # crosses between processes, for it may end one of them.
        last = self.stack.in_place and self.geometry.shard is None
        if not last:
            self._check_chunk()
        try:
            states = self.stack.remember_all(self._committed())
        finally:  # also if that failed: a broken contract is told first
            if last:
                self._check_chunk()
        assert self.plan is not None
        selected = [cache.selected for cache in self.caches if cache.selected is not None]
        return Past(self.stack.committed(self.plan, selected), states)

    def _committed(self) -> Iterator[tuple[Any, Chunk]]:
        for cache in self.caches:
            yield cache.committed()
            if not self.stack.in_place:  # or all layers would hold three windows: before, in and behind the chunk
                cache.clear()

    def _check_chunk(self) -> None:
        if not agreed(self.geometry.shard, check_layers(self.caches), [cache.selected for cache in self.caches]):
            self.check_policies()

    def adopt(self, past: Past) -> None:
        """End the chunk in progress."""
        states = tuple(self.stack.written(state) for state in past.states)  # certain now, so slots may be written
        # The same object where nothing was to write, so that a chunk that fails leaves `past` as it was.
        self.past = past if all(map(is_, states, past.states)) else Past(past.book, states)
        self.plan, self.step = None, -1
        self._expected, self._retry, self.layers = None, None, ()
        for cache in self.caches:
            cache.clear()

    def _make_plan(self, frames: int) -> None:
        self.plan = self.stack.plan(self.past.book, frames, self.geometry)
        self._settled = object()

    def _announce(self, **what: Any) -> tuple[ForwardLayer, ...]:
        assert self.plan is not None
        states = self.past.states if self._retry is None else self._retry  # a retry's are what `veto` gave
        places = tuple(self.twin_span(piece).coordinates for piece in what.get("twins", ()))
        forward = Forward(self.plan, self.caches[0], self._settled, states, places=places, **what)
        self.layers = tuple(ForwardLayer(cache, forward) for cache in self.caches)
        return self.layers

    def replays(self, coming: int = 0) -> tuple[int, ...]:
        """Return the frames of each forward of a replay, oldest first; the last `coming` are in no history yet."""
        return self.stack.replays(self.past.book, coming)

    def rewind(self, frames: int) -> None:
        """Take the last frames out of history; they must be committed again, one of `replays` after the other."""
        tokens, states = frames * self.geometry.tokens_per_frame, self.past.states
        if tokens:  # in a video's first chunk a joint replay has nothing to forget
            with memory_call(self.stack, "forget", self.policy_seconds):
                states = tuple(self.stack.forget(state, tokens) for state in states)
        self.adopt(Past(self.stack.rewound(self.past.book, frames), states))

    def notify(self, event: Event) -> None:
        """Let the memory know what has happened between two chunks."""
        with memory_call(self.stack, "happened", self.policy_seconds):
            states = tuple(self.stack.happened(state, event) for state in self.past.states)
        self.adopt(replace(self.past, states=states))

    def review(self, latents: Tensor) -> Bool[Tensor, " batch"] | None:
        """Return rows of the chunk that must be made anew, for which the memory is then ready; None accepts it."""
        if self.stack.max_retries:
            with memory_call(self.stack, "veto", self.policy_seconds):
                made = [self.stack.veto(state, latents) for state in self.past.states]
            rows, states = vetoes(self.stack, made, latents.shape[0])
            if rows is not None:
                # The first step of another try need not be step 0: two experts share a chunk's.
                self._retry, self.plan = states, None
                return rows
        self.settle()
        return None

    def settle(self) -> None:
        """End the retries: the commit attends what the first try attended."""
        if self._retry is not None:
            self._retry, self._settled = None, object()

    def attended(self, layer: int) -> KeysValues:
        """Return rotated keys and values of history, `[rows, tokens, heads, head_dim]`, that a layer attends.

        They hold until the next forward. Rows that attend fewer tokens than others end in anything.

        Raises:
            RuntimeError: unless the chunk in progress has had a forward.
        """
        return self.caches[layer].history()

    def state(self) -> Past:
        """Return everything that the generation remembers, as data; what becomes of the session doesn't change it."""
        return Past(self.past.book.counting({}), tuple(self.stack.fork(state) for state in self.past.states))

    def stats(self) -> dict[str, Any]:
        """Return tokens and bytes of this session; see `session_stats`."""
        return session_stats(self)

    def snapshot(self) -> "Session":
        """Return an independent session at the last commit, to resume or to fork from."""
        return Session(self.stack, self.geometry, self.state(), self._layer)


def finish_commits(sessions: Sequence[Session], together: AbstractContextManager[None] | None = None) -> None:
    """Finish the commit of all guidance branches of a generation, or of none.

    Args:
        sessions: of the branches that this process runs.
        together: raises if another process that runs a branch cannot finish.

    Raises:
        PolicyError: if a policy broke its contract in this chunk; every history is then as it was.
    """
    try:
        with together or nullcontext():
            # All before any is adopted: what may fail for want of memory does so here.
            pasts = [session.prepared() for session in sessions]
    except BaseException:
        for session in sessions:
            if not session.stack.in_place:  # layers may have let go of what they attended: the chunk is made again
                session.adopt(session.past)
        raise
    for session, past in zip(sessions, pasts, strict=True):
        session.adopt(past)
