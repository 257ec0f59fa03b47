"""The contract of a memory: what of the past a chunk attends, in host integers once a chunk and in tensors by layer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import chain
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float
from torch import Tensor

from kvpack.errors import InvalidOptionError, PolicyError
from kvpack.memory.attribution import memory_call
from kvpack.memory.geometry import Geometry
from kvpack.memory.ledger import BlockEntry
from kvpack.memory.plan import Book, Plan
from kvpack.memory.policy import Policy
from kvpack.memory.roles import LatentCompressor
from kvpack.memory.rope import rotate, rotations
from kvpack.memory.store import KeysValues
from kvpack.memory.tokens import Tokens

Commit = Literal["rerun", "last-step"]
Event = Literal["prompt-changed", "scene-cut"]


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
        earlier: queries of the forwards of this chunk before this one, oldest first, if the memory needs queries.
        latents: the clean latents, in the forward of the clean chunk.
        plan: what is known of the chunk in host integers.
        shared: what the first layer's `Attended` tells the other layers.
        twins: keys and values that a latent-space compressor's tokens have in this layer.
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
    plan: Plan | None = None
    shared: Any = None
    twins: Mapping[BlockEntry, KeysValues] = field(default_factory=dict)

    def sum_heads(self, mine: Tensor) -> Tensor:
        """Return what is summed over this chunk's heads, summed over those that other processes hold too."""
        return self.geometry.sum_heads(mine)

    def rotated(self, queries: Tensor) -> Tensor:
        """Return queries of this chunk after RoPE at their places in the video."""
        return rotate(queries, rotations(self.tokens.coordinates, self.geometry))


@dataclass(frozen=True, eq=False)
class Attended:
    """What a chunk attends beside itself.

    Args:
        tokens: at the places where they are attended; a list holds those of each row, where rows differ in number.
        chunk_start: temporal position of the chunk's first frame, one for all rows or `[rows]`.
        state: what is handed to `remember` in the place of the state before.
        hidden: first tokens of the chunk that not even the chunk attends.
        rotations: those of all tokens in order, in pieces, where layers share them; otherwise the tokens' coordinates
            say them.
        selected: indices of the chosen blocks, `[rows, chosen]`, for `stats()`.
        candidates: of how many blocks those were chosen; each row of `selected` ascends then. `Memory.explain` is asked
            at the end of the chunk if one is out of range or there twice.
        shared: told to the layers behind the first, as `Chunk.shared`.
        suspect: a scalar on the device; where it is true, `Memory.explain` is asked at the end of the chunk.
    """

    tokens: tuple[Tokens, ...] | list[tuple[Tokens, ...]]
    chunk_start: float | Tensor
    state: Any
    hidden: int = 0
    rotations: tuple[Tensor, ...] | None = None
    selected: Tensor | None = None
    candidates: int = 0
    shared: Any = None
    suspect: Tensor | None = None

    @property
    def parts(self) -> Iterator[Tokens]:
        """All tokens, those of each row one after the other where rows differ."""
        return chain.from_iterable(self.tokens if isinstance(self.tokens, list) else [self.tokens])


class Memory(Policy, ABC):
    """What of the past a chunk attends. A frozen dataclass; what belongs to one generation is the state it is given.

    What is known in host integers is decided once a chunk for all layers (`book`, `plan`, `committed`, `rewound`); what
    needs tensors once a chunk and layer (`start`, `attend`, `remember`). `Stack` is a memory of four small policies. A
    method that they cannot say is a subclass of `StateMemory`.
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
    max_retries: ClassVar[int] = 0
    #: Whether what is attended depends on the denoising step; otherwise it is settled at the first one.
    every_step: ClassVar[bool] = False
    #: Whether `Chunk.earlier` is filled.
    needs_queries: ClassVar[bool] = False
    #: Whether it is made of policies that are named in errors, and timed, in its place.
    composite: ClassVar[bool] = False
    #: Whether its blocks lie in the engine's arenas, in attended order; otherwise its state holds tensors of its own.
    in_place: ClassVar[bool] = False

    @property
    def keeps_rotated(self) -> bool:
        """Whether keys are kept after RoPE, since they never move and are read by nothing but attention."""
        return False

    @property
    def committed_queries(self) -> int:
        """Most queries of a committed chunk that are kept for `remember` where the engine stores blocks."""
        return 0

    @property
    def needs_pixels(self) -> bool:
        """Whether chunks must be decoded as they come."""
        return self.reencodes or (self.latent_compressor is not None and self.latent_compressor.needs_pixels)

    @property
    def latent_compressor(self) -> LatentCompressor | None:
        """What makes hidden tokens of clean latents, if anything does."""
        return None

    def book(self) -> Book:
        """Return the host's view of an empty past."""
        return Book()

    def plan(self, book: Book, coming: int, geometry: Geometry) -> Plan:
        """Return what is known, without any tensor, of a chunk of `coming` latent frames behind a past."""
        return Plan(book, coming, geometry)

    def committed(self, plan: Plan, selected: Sequence[Tensor] = ()) -> Book:
        """Return the book with the planned chunk in it; a replayed chunk may be several in one.

        Args:
            plan: the chunk.
            selected: which of several blocks each layer has chosen, as `Attended.selected`.
        """
        book, chunks = plan.book, -(-plan.coming // self.chunk_frames)
        return Book(book.frames + plan.coming, book.chunks + chunks, book.seconds)

    def rewound(self, book: Book, frames: int) -> Book:
        """Return the book without its last latent frames."""
        return Book(book.frames - frames, book.chunks - -(-frames // self.chunk_frames), book.seconds)

    def replays(self, book: Book, coming: int = 0) -> tuple[int, ...]:
        """Return the frames of each forward of a replay, oldest first.

        Args:
            book: the past.
            coming: frames of a chunk that is not committed yet and is the last of them.
        """
        frames = min(self.replay_frames, book.frames + coming)
        if self.replays_jointly:
            return (frames,) if frames else ()
        # Without the newest chunk, which is a forward of its own.
        whole, rest = divmod(frames - coming, self.chunk_frames)
        first = (rest,) if rest and frames == book.frames + coming else ()  # a video's first chunk may be shorter
        last = (coming,) if coming else ()
        return first + (self.chunk_frames,) * whole + last

    def start(self, geometry: Geometry, layer: int) -> Any:
        """Return the state of a layer before the first chunk."""
        return None

    @abstractmethod
    def attend(self, state: Any, chunk: Chunk) -> Attended:
        """Return what a chunk attends, at its first forward."""

    @abstractmethod
    def remember(self, state: Any, chunk: Chunk) -> Any:
        """Return the state with the clean chunk in it.

        Args:
            state: what `attend` gave for this chunk.
            chunk: the forward whose keys and values become history.
        """

    def remember_all(self, committed: Iterable[tuple[Any, Chunk]]) -> tuple[Any, ...]:
        """Return the states of all layers with the clean chunk in them.

        Args:
            committed: of each layer, what `remember` is given; of states that are values, the layer lets go of its own
                when the next one is asked for.
        """
        made = []
        for state, chunk in committed:
            assert chunk.plan is not None
            with memory_call(self, "remember", chunk.plan.book.seconds, chunk.layer):
                made.append(self.remember(state, chunk))
        return tuple(made)

    def forget(self, state: Any, tokens: int) -> Any:
        """Return the state without the newest `tokens` tokens of history, which are about to be replayed."""
        raise NotImplementedError(f"{type(self).__name__} has replay_frames, so it must have forget()")

    def happened(self, state: Any, event: Event) -> Any:
        """Return the state after something has happened between two chunks, before a replay."""
        return state

    def veto(
        self, state: Any, latents: Float[Tensor, "batch channels frames height width"]
    ) -> tuple[Bool[Tensor, " batch"], Any]:
        """Return which rows' chunk is to be generated anew, booleans `[batch]`, and the state to do it with.

        The state before is there again once all rows are accepted or the retries are used up. All layers must veto the
        same rows. Called only if `max_retries` is not 0.
        """
        raise NotImplementedError(f"{type(self).__name__} has max_retries, so it must have veto()")

    def written(self, state: Any) -> Any:
        """Return the state once its commit is certain; the first moment at which storage may be written over."""
        return state

    def fork(self, state: Any) -> Any:
        """Return a state that does not notice what becomes of this one; a state of values is its own fork."""
        return state

    def explain(self, attended: Attended, plan: Plan, layer: int) -> None:
        """Raise `PolicyError` if what was attended breaks the contract; waits for the device."""
        for tokens in attended.parts:
            for what in ("keys", "values", "coordinates"):
                if not bool(getattr(tokens, what).isfinite().all()):
                    name = type(self).__name__
                    raise PolicyError(f"{name}.attend returned {what} for layer {layer} that are not finite")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as JSON takes it: its name and options."""
        if not is_dataclass(self):
            raise InvalidOptionError(f"{type(self).__name__} must be a dataclass to be written as data")
        return {"memory": self.name, **{each.name: getattr(self, each.name) for each in fields(self)}}


class StateMemory(Memory):
    """A memory whose past is a value of its own for each layer, and that says what follows from it.

    Nothing is changed in place: `attend` and `remember` return new values, so that a chunk can be done again, a session
    be forked, and a commit is all or nothing.
    """
