"""The plan of a stack: its blocks, their order and their positions, before any layer has chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from kvpack.memory.attribution import broken, policy_call
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.memory.ledger import BlockEntry, Ledger, Step
from kvpack.memory.plan import Book, Plan, at
from kvpack.memory.prefetch import Prefetch
from kvpack.memory.roles import Layout, Part, Placement
from kvpack.memory.room import arena_room
from kvpack.memory.rope import rotations, wide_dtype
from kvpack.memory.sending import sent

if TYPE_CHECKING:
    from kvpack.memory.stack import Stack
    from kvpack.memory.stack_state import StackState


@dataclass(frozen=True)
class StackBook(Book):
    """A stack's view of the past.

    Args:
        ledger: which frames are held whole, which compressed, and in which slot.
        aim: the ledger that a replay will have come back to.
    """

    ledger: Ledger = field(kw_only=True)
    aim: Ledger | None = None

    @classmethod
    def of(cls, ledger: Ledger, aim: Ledger | None = None) -> "StackBook":
        """Return the book of a ledger."""
        return cls(ledger.frames, ledger.chunks, ledger.seconds, aim, ledger=ledger)

    def counting(self, seconds: dict[str, float]) -> "StackBook":
        """Return the same past in a book that counts in `seconds`."""
        return StackBook.of(replace(self.ledger, seconds=seconds), self.aim)


@dataclass(frozen=True, eq=False)
class Placed:
    """Attended blocks of a choice at their positions: sink, chosen mid, recent.

    Args:
        placement: what the re-indexer gave.
        ratios: positions that a frame of each block spans.
        begins: position of each token's block.
        squeezed: positions that a frame of each token's block spans.
        places: (t, y, x) of all tokens, block behind block.
        edges: first token of each block, and the number of all.
        geometry: the model.
    """

    placement: Placement
    ratios: Float[Tensor, "rows blocks"]
    begins: Float[Tensor, "rows tokens"]
    squeezed: Float[Tensor, "rows tokens"]
    places: Float[Tensor, "rows tokens 3"]
    edges: tuple[int, ...]
    geometry: Geometry

    def of(self, first: int, last: int) -> Float[Tensor, "rows some 3"]:
        """Return the places of the tokens of blocks `first` to `last`, without `last`."""
        return self.places[:, self.edges[first] : self.edges[last]]

    @cached_property
    def suspect(self) -> Tensor:
        """Whether a position is not finite; a scalar on the device."""
        given = self.placement
        # Of each row: where its blocks begin and how long they are, and where the chunk begins.
        numbers = torch.cat([given.starts.flatten(), given.lengths.flatten(), given.chunk_start])
        return ~numbers.isfinite().all()

    @cached_property
    def rotations(self) -> Complex[Tensor, "rows tokens one_or_heads half"]:
        """Rotations of all tokens."""
        return rotations(self.places, self.geometry)


class StackPlan(Plan):
    """The attended blocks of one chunk, the same for all layers but for the choice of mid blocks."""

    def __init__(self, stack: "Stack", book: StackBook, coming: int, geometry: Geometry) -> None:
        super().__init__(book, coming, geometry)
        self.stack, self.aim = stack, book.aim
        self.ledger = book.ledger if coming == book.ledger.coming else book.ledger.expecting(coming)
        self.sink = [index for index, piece in enumerate(self.ledger.whole) if piece.part == "sink"]
        self.recent = [index for index, piece in enumerate(self.ledger.whole) if piece.part == "recent"]
        self.chosen = self._limit(len(self.ledger.archive))
        #: Archived blocks, if any of them is attended.
        self.mid = self.ledger.archive if self.chosen else ()
        self.takes_all = self.chosen == len(self.mid)
        self.mid_first_frames = tuple(piece.first_frame for piece in self.mid)
        self.mid_frames = tuple(piece.frames for piece in self.mid)
        compressor, grid = stack.compressor, geometry.grid
        # By contract the same at every first frame, so one of each length does.
        self.spans = {frames: compressor.span(0, frames, grid) for frames in {piece.block_frames for piece in self.mid}}
        self.tokens = [self.spans[piece.block_frames].tokens for piece in self.mid]
        #: Of each mid block, how small it is attended, and the tokens that are then left.
        # `mid` is oldest first, so the greatest age comes first.
        self.levels = [self._level(age) for age in reversed(range(len(self.mid)))]
        self.attended = [
            compressor.shrunk_span(self.spans[piece.block_frames], grid, level)
            if level
            else self.spans[piece.block_frames]
            for piece, level in zip(self.mid, self.levels, strict=True)
        ]
        #: Mid blocks of one size: a choice is gathered on the device, whatever it is.
        self.uniform = len(self.spans) <= 1 and not any(self.levels)
        #: Whether all choices have the same positions: a merged block has more frames than another in as many of them.
        self._places_alike = stack.reindexer.shared and len(set(self.mid_frames)) == 1
        #: Archived keys of the next layer that are on their way.
        self.ahead = Prefetch()
        self._placed: dict[torch.device, Placed] = {}
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @cached_property
    def new_pieces(self) -> tuple[BlockEntry, ...]:
        """The coming chunk, cut wherever a part will ever begin or end."""
        return self.ledger.new_pieces()

    @cached_property
    def step(self) -> Step:
        """What the commit does to the pieces."""
        # A replay goes back to the parts that were: `commit` would archive blocks a second time.
        return self.ledger.commit(self.new_pieces) if self.aim is None else self.ledger.replayed(self.aim)

    @property
    def after(self) -> StackBook:
        """The book with the chunk in it."""
        ledger, aim = self.step.ledger, self.aim
        # A replay ends when history is as long again.
        return StackBook.of(ledger, aim if aim is not None and ledger.frames < aim.frames else None)

    def counted(self, selected: Sequence[Tensor]) -> StackBook:
        """Return the book with the chunk in it and what layers have chosen; waits for the device."""
        indices = torch.cat([each.flatten().to(selected[0].device) for each in selected])  # [layers * rows * chosen]
        times = torch.bincount(indices, minlength=len(self.mid)).tolist()
        chosen = {piece.first_frame: count for piece, count in zip(self.mid, times, strict=True)}
        offered = sum(each.shape[0] for each in selected)
        return replace(self.after, ledger=self.step.ledger.counted(offered, chosen))

    def room(self) -> tuple[int, int]:
        """Return as much as the largest chunk of the video needs; the first one may be shorter than the rest."""
        book = self.book
        first = book.frames - (book.chunks - 1) * self.stack.chunk_frames if book.chunks else self.coming
        return arena_room(self.stack, self.geometry, first)

    def prefetch(self, state: "StackState | None") -> None:
        """Begin to bring the archived keys by which the next layer chooses."""
        if state is None:
            self.ahead.drop()
        elif not self.stack.share_selection:  # else the first layer alone reads keys to choose
            state.archive.begin(self.ahead)

    def on(self, device: torch.device) -> tuple[Int[Tensor, " blocks"], Int[Tensor, " blocks"]]:
        """Return slot and token count of every mid block; copied to the device once for all layers."""
        if device not in self._on:
            slots = [piece.slot for piece in self.mid]
            self._on[device] = sent(torch.tensor(slots), device), sent(torch.tensor(self.tokens), device)
        return self._on[device]

    def place(self, chosen: Tensor | list[int] | None, device: torch.device) -> Placed:
        """Return positions for a choice: indices of all rows at once, the list of one row, or None for all blocks."""
        # A list is the choice of one row, which no other layer shares.
        if chosen is not None and (isinstance(chosen, list) or not self.shares(chosen)):
            return self._place(chosen, device)
        if device not in self._placed:
            self._placed[device] = self._place(list(range(self.chosen)), device)  # any choice: all are placed alike
        return self._placed[device]

    def shares(self, chosen: Tensor | list[int] | None) -> bool:
        """Return whether `place` gives every layer the same."""
        return chosen is None or (isinstance(chosen, Tensor) and self._places_alike)

    def absolute_rotations(
        self, block: int | None, device: torch.device, own: Tensor | None = None
    ) -> Complex[Tensor, "rows tokens one_or_heads half"]:
        """Return rotations to the positions in the video of a mid block, or of the current chunk if None.

        Args:
            block: index of the block.
            device: where they are needed.
            own: places of the block's tokens, if they are not the announced ones.
        """
        piece = BlockEntry(self.book.frames, self.coming) if block is None else self.mid[block]
        grid = grid_coordinates(self.coming, self.geometry.grid)
        announced = grid if block is None else self.spans[piece.block_frames].coordinates
        coordinates = announced if own is None else own
        start = torch.full((1,), float(piece.first_frame), dtype=wide_dtype(device), device=device)
        return rotations(at(coordinates, start, torch.ones_like(start)), self.geometry)

    def _place(self, chosen: Tensor | list[int], device: torch.device) -> Placed:
        layout = self._layout(chosen, device)
        with policy_call(self.stack.reindexer, "place", self.ledger.seconds):
            given = self.stack.reindexer.place(layout)
        placement = self._checked(layout, given)
        # Not 1 where blocks are merged, or squeezed as by `fit`.
        ratios, grid = placement.lengths / layout.frames, self.geometry.grid
        # A tensor's choice is of blocks of one size, so that the host need not know it.
        mid = [self.attended[0]] * self.chosen if isinstance(chosen, Tensor) else [self.attended[i] for i in chosen]
        sink, recent = ([self.ledger.whole[i].frames for i in part] for part in (self.sink, self.recent))
        coordinates = [
            torch.empty(0, 3),  # edges begin with 0, also where nothing is attended
            *(grid_coordinates(frames, grid) for frames in sink),
            *(span.coordinates for span in mid),
            *(grid_coordinates(frames, grid) for frames in recent),
        ]
        edges = tuple(accumulate(map(len, coordinates)))
        counts = sent(torch.tensor([len(each) for each in coordinates[1:]], dtype=torch.long), device)
        # Without `output_size` the host waits to learn the sum of counts.
        begins, squeezed = (
            each.repeat_interleave(counts, dim=1, output_size=edges[-1]) for each in (placement.starts, ratios)
        )
        places = at(torch.cat(coordinates), begins, squeezed)
        return Placed(placement, ratios, begins, squeezed, places, edges, self.geometry)

    def _layout(self, chosen: Tensor | list[int], device: torch.device) -> Layout:
        """Return the attended blocks; rows differ only where a tensor has chosen."""
        index = chosen if isinstance(chosen, Tensor) else sent(torch.tensor([chosen], dtype=torch.long), device)
        # A wrong index is reported at the end of the chunk; until then it must not crash the device.
        index = index.clamp(0, max(0, len(self.mid) - 1))

        def column(sink: list[int], mid: list[int], recent: list[int]) -> Float[Tensor, "rows blocks"]:
            def row(values: list[int]) -> Tensor:
                return sent(torch.tensor(values, dtype=wide_dtype(device)), device)

            rows = index.shape[0]
            return torch.cat([row(sink).expand(rows, -1), row(mid)[index], row(recent).expand(rows, -1)], dim=1)

        sink, recent = ([self.ledger.whole[i] for i in part] for part in (self.sink, self.recent))
        counts: tuple[tuple[Part, int], ...] = (("sink", len(sink)), ("mid", self.chosen), ("recent", len(recent)))
        return Layout(
            parts=tuple(part for part, count in counts for _ in range(count)),
            first_frames=column(*([p.first_frame for p in part] for part in (sink, self.mid, recent))),
            frames=column(*([p.frames for p in part] for part in (sink, self.mid, recent))),
            lengths=column(*([p.block_frames for p in part] for part in (sink, self.mid, recent))),
            chunk_first_frame=self.ledger.frames,
            chunk_frames=self.coming,
        )

    def _checked(self, layout: Layout, placement: Placement) -> Placement:
        reindexer, wanted = self.stack.reindexer, tuple(layout.frames.shape)
        if not isinstance(placement, Placement):
            raise broken(reindexer, "place", type(placement).__name__, "it must be a Placement")
        for what, expected in (("starts", wanted), ("lengths", wanted), ("chunk_start", wanted[:1])):
            given = getattr(placement, what)
            if not isinstance(given, Tensor) or not given.is_floating_point() or tuple(given.shape) != expected:
                shown = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise broken(reindexer, "place", f"{what} {shown}", f"it must be floating point {expected}")
        return placement

    def _level(self, age: int) -> int:
        level = self.stack.compressor.level(age)
        if not isinstance(level, int) or level < 0:
            given = f"{level!r} for age {age}"
            raise broken(self.stack.compressor, "level", given, "it must be a whole number >= 0")
        return level

    def _limit(self, candidates: int) -> int:
        selector = self.stack.selector
        with policy_call(selector, "limit", self.ledger.seconds):
            chosen = selector.limit(candidates)
        if not isinstance(chosen, int) or not 0 <= chosen <= candidates:
            raise broken(selector, "limit", repr(chosen), f"it must be an int from 0 to {candidates}")
        return chosen
