"""What one chunk attends, before any layer has chosen: blocks, their order and their positions."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvpack.errors import PolicyError
from kvpack.memory.attribution import blamed
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.memory.layer import KeysValues, Turns
from kvpack.memory.ledger import Ledger, Piece
from kvpack.memory.roles import Layout, Part, Placement, Reindexer, Selector
from kvpack.memory.rope import rotations, wide_dtype
from kvpack.memory.stack import Stack


@dataclass(frozen=True, eq=False)
class Held:
    """A piece of history at full resolution, with its compressed twin if that was made at commit."""

    piece: Piece
    layers: tuple[KeysValues, ...]
    twin: tuple[KeysValues, ...] | None = None


@dataclass(eq=False)
class Context:
    """The attended blocks of one chunk, the same for all layers but for the choice of mid blocks.

    Args:
        stack: the policy.
        geometry: the model.
        ledger: the history.
        held: its whole pieces.
    """

    stack: Stack
    geometry: Geometry
    ledger: Ledger
    held: tuple[Held, ...]
    _shared: dict[torch.device, Turns] = field(default_factory=dict)
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)
    #: The first layer's choice, if the stack has all layers share it.
    choice: Tensor | None = None

    def __post_init__(self) -> None:
        self.selector: Selector = self.stack.selector
        self.reindexer: Reindexer = self.stack.reindexer
        self.chunk = self.ledger.chunks
        self.sink = [held for held in self.held if held.piece.part == "sink"]
        self.recent = [held for held in self.held if held.piece.part == "recent"]
        self.chosen = self._limit(len(self.ledger.archive))
        archive = self.ledger.archive if self.chosen else ()
        self.slots = [piece.slot for piece in archive]
        self.first_frames = tuple(piece.first_frame for piece in archive)
        self.frames = tuple(piece.frames for piece in archive)
        self.spans = {frames: self.stack.compressor.span(0, frames, self.geometry.grid) for frames in set(self.frames)}
        self.tokens = [self.spans[frames].tokens for frames in self.frames]
        self.takes_all = self.chosen == len(archive)
        compressor, grid = self.stack.compressor, self.geometry.grid
        #: Of each mid block, how small it is attended, and the tokens that are then left.
        self.levels = [self._level(age) for age in reversed(range(len(archive)))]
        self.attended = [
            compressor.shrunk_span(self.spans[frames], grid, level) if level else self.spans[frames]
            for frames, level in zip(self.frames, self.levels, strict=True)
        ]
        #: Mid blocks of one size: a choice is gathered on the device, whatever it is.
        self.uniform = len(self.spans) <= 1 and not any(self.levels)

    def _level(self, age: int) -> int:
        level = self.stack.compressor.level(age)
        if not isinstance(level, int) or level < 0:
            name = type(self.stack.compressor).__name__
            raise PolicyError(f"{name}.level returned {level!r} for age {age}, but it must be a whole number >= 0")
        return level

    def _limit(self, candidates: int) -> int:
        with blamed(self.selector, "limit", self.ledger.seconds):
            chosen = self.selector.limit(candidates)
        if not isinstance(chosen, int) or not 0 <= chosen <= candidates:
            name = type(self.selector).__name__
            raise PolicyError(f"{name}.limit returned {chosen!r}, but there are {candidates} candidates")
        return chosen

    def on(self, device: torch.device) -> tuple[Int[Tensor, " blocks"], Int[Tensor, " blocks"]]:
        """Slot and token count of every mid block; copied to the device once for all layers."""
        if device not in self._on:
            self._on[device] = torch.tensor(self.slots, device=device), torch.tensor(self.tokens, device=device)
        return self._on[device]

    @cached_property
    def capacity(self) -> int:
        """Most tokens of history and current chunk that a row can attend."""
        whole = sum(held.piece.frames for held in self.held) + self.ledger.coming
        mid = sorted((span.tokens for span in self.attended), reverse=True)
        return whole * self.geometry.tokens_per_frame + sum(mid[: self.chosen])

    def turns(self, chosen: Tensor | list[int] | None, device: torch.device) -> Turns:
        """Rotations for a choice: indices of all rows at once, the list of one row, or None for all blocks."""
        if isinstance(chosen, list) or (isinstance(chosen, Tensor) and not self.reindexer.shared):
            return self._turns(chosen, device)
        if device not in self._shared:
            self._shared[device] = self._turns(list(range(self.chosen)), device)
        return self._shared[device]

    def _turns(self, chosen: Tensor | list[int], device: torch.device) -> Turns:
        layout = self._layout(chosen, device)
        with blamed(self.reindexer, "place", self.ledger.seconds):
            given = self.reindexer.place(layout)
        placement = self._checked(layout, given)
        ratios = placement.lengths / layout.frames
        mid = [self.attended[0]] * self.chosen if isinstance(chosen, Tensor) else [self.attended[i] for i in chosen]
        coordinates = [
            *(grid_coordinates(held.piece.frames, self.geometry.grid) for held in self.sink),
            *(span.coordinates for span in mid),
            *(grid_coordinates(held.piece.frames, self.geometry.grid) for held in self.recent),
        ]
        positions = [layout.frames.new_empty(layout.frames.shape[0], 0, 3)]
        for block, each in enumerate(coordinates):
            positions.append(_at(each.to(device), placement.starts[:, block], ratios[:, block]))
        context = rotations(torch.cat(positions, dim=1), self.geometry)
        return Turns(placement, context, self.chunk_turns(placement, self._chunk_coordinates))

    @cached_property
    def _chunk_coordinates(self) -> Float[Tensor, "tokens 3"]:
        return grid_coordinates(self.ledger.coming, self.geometry.grid)

    def _layout(self, chosen: Tensor | list[int], device: torch.device) -> Layout:
        """The attended blocks; rows differ only where a tensor has chosen."""
        index = chosen if isinstance(chosen, Tensor) else torch.tensor([chosen], dtype=torch.long, device=device)
        # A wrong index is reported at the end of the chunk; until then it must not crash the device.
        index = index.clamp(0, max(0, len(self.slots) - 1))

        def column(sink: list[int], mid: tuple[int, ...], recent: list[int]) -> Float[Tensor, "rows blocks"]:
            def row(values: list[int] | tuple[int, ...]) -> Tensor:
                return torch.tensor(values, dtype=wide_dtype(device), device=device)

            rows = index.shape[0]
            return torch.cat([row(sink).expand(rows, -1), row(mid)[index], row(recent).expand(rows, -1)], dim=1)

        sink, recent = [held.piece for held in self.sink], [held.piece for held in self.recent]
        counts: tuple[tuple[Part, int], ...] = (("sink", len(sink)), ("mid", self.chosen), ("recent", len(recent)))
        return Layout(
            parts=tuple(part for part, count in counts for _ in range(count)),
            first_frames=column([p.first_frame for p in sink], self.first_frames, [p.first_frame for p in recent]),
            frames=column([p.frames for p in sink], self.frames, [p.frames for p in recent]),
            chunk_first_frame=self.ledger.frames,
            chunk_frames=self.ledger.coming,
        )

    def chunk_turns(self, placement: Placement, coordinates: Float[Tensor, "tokens 3"]) -> Tensor:
        """Rotations of tokens of the current chunk, given where they sit in it."""
        return self._turned(coordinates, placement.chunk_start)

    def absolute_turns(self, block: int | None, device: torch.device) -> Tensor:
        """Rotations to the positions in the video of a mid block, or of the current chunk if None."""
        coordinates = self._chunk_coordinates if block is None else self.spans[self.frames[block]].coordinates
        first = self.ledger.frames if block is None else self.first_frames[block]
        return self._turned(coordinates, torch.full((1,), float(first), dtype=wide_dtype(device), device=device))

    def _turned(self, coordinates: Float[Tensor, "tokens 3"], start: Float[Tensor, " rows"]) -> Tensor:
        return rotations(_at(coordinates.to(start.device), start, torch.ones_like(start)), self.geometry)

    def _checked(self, layout: Layout, placement: Placement) -> Placement:
        name, wanted = type(self.reindexer).__name__, tuple(layout.frames.shape)
        if not isinstance(placement, Placement):
            raise PolicyError(f"{name}.place returned {type(placement).__name__}, but it must be a Placement")
        for what, expected in (("starts", wanted), ("lengths", wanted), ("chunk_start", wanted[:1])):
            given = getattr(placement, what)
            if not isinstance(given, Tensor) or not given.is_floating_point() or tuple(given.shape) != expected:
                shown = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise PolicyError(f"{name}.place returned {what} {shown}, but it must be floating point {expected}")
        return placement


def _at(
    coordinates: Float[Tensor, "tokens 3"], start: Float[Tensor, " rows"], ratio: Float[Tensor, " rows"]
) -> Float[Tensor, "rows tokens 3"]:
    """(t, y, x) positions of tokens whose block starts at `start` and is squeezed by `ratio`."""
    time = start[:, None] + (coordinates[:, 0] + 0.5) * ratio[:, None] - 0.5
    place = coordinates[:, 1:].to(time.dtype).expand(time.shape[0], -1, -1)
    return torch.cat([time[..., None], place], dim=-1)
