"""What one chunk attends, before any layer has chosen: blocks, their order and their positions."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from kvpack.blocks import grid_coordinates
from kvpack.errors import PolicyError
from kvpack.geometry import Geometry
from kvpack.layer import KeysValues, Turns
from kvpack.ledger import Ledger, Piece
from kvpack.roles import Layout, Placement, Reindexer, Selector
from kvpack.rope import rotations, wide_dtype
from kvpack.stack import Stack


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

    def __post_init__(self) -> None:
        self.selector: Selector = self.stack.selector
        self.reindexer: Reindexer = self.stack.reindexer
        self.chunk = self.ledger.chunks
        self.sink = [held for held in self.held if held.piece.part == "sink"]
        self.recent = [held for held in self.held if held.piece.part == "recent"]
        archive = self.ledger.archive
        self.slots = [piece.slot for piece in archive]
        self.first_frames = tuple(piece.first_frame for piece in archive)
        self.frames = tuple(piece.frames for piece in archive)
        self.tokens = [self.span_tokens(piece) for piece in archive]
        self.chosen = self.selector.limit(len(archive))
        if not isinstance(self.chosen, int) or not 0 <= self.chosen <= len(archive):
            name = type(self.selector).__name__
            raise PolicyError(f"{name}.limit returned {self.chosen!r}, but there are {len(archive)} candidates")
        if self.chosen == 0:
            self.slots, self.first_frames, self.frames, self.tokens = [], (), (), []
        self.takes_all = self.chosen == len(self.slots)
        #: Mid blocks of one size: a choice is gathered on the device, whatever it is.
        self.uniform = len(set(zip(self.frames, self.tokens, strict=True))) <= 1

    def span_tokens(self, piece: Piece) -> int:
        """Tokens that stand for a compressed piece."""
        return self.stack.compressor.span(piece.first_frame, piece.frames, self.geometry.grid).tokens

    @cached_property
    def capacity(self) -> int:
        """Most tokens of history and current chunk that a row can attend."""
        whole = sum(held.piece.frames for held in self.held) + self.stack.chunk_frames
        return whole * self.geometry.tokens_per_frame + sum(sorted(self.tokens, reverse=True)[: self.chosen])

    def turns(self, chosen: Tensor | list[int] | None, device: torch.device) -> Turns:
        """Rotations for a choice: a tensor of indices for all rows at once, the list of one row, or None for all blocks."""
        independent = chosen is None or (isinstance(chosen, Tensor) and self.reindexer.shared)
        if not independent:
            return self._place(chosen, device)
        if device not in self._shared:
            self._shared[device] = self._place(range(self.chosen), device)
        return self._shared[device]

    def _place(self, chosen: Tensor | list[int] | range | None, device: torch.device) -> Turns:
        wide = wide_dtype(device)

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=wide, device=device)

        mid_first, mid_frames = column([float(f) for f in self.first_frames]), column([float(f) for f in self.frames])
        if isinstance(chosen, Tensor):
            rows, index = chosen.shape[0], chosen.clamp(0, len(self.slots) - 1)
            sizes = [(self.frames[0], self.tokens[0])] * self.chosen
        else:
            rows, index = 1, torch.tensor([list(chosen or [])], dtype=torch.long, device=device)
            sizes = [(self.frames[i], self.tokens[i]) for i in chosen or []]
        sink, recent = [h.piece for h in self.sink], [h.piece for h in self.recent]

        def joined(before: list[int], mid: Tensor, after: list[int]) -> Float[Tensor, "rows blocks"]:
            parts = (column([float(v) for v in before]), column([float(v) for v in after]))
            return torch.cat([parts[0].expand(rows, -1), mid[index], parts[1].expand(rows, -1)], dim=1)

        layout = Layout(
            parts=("sink",) * len(sink) + ("mid",) * self.chosen + ("recent",) * len(recent),
            first_frames=joined([p.first_frame for p in sink], mid_first, [p.first_frame for p in recent]),
            frames=joined([p.frames for p in sink], mid_frames, [p.frames for p in recent]),
            chunk_first_frame=self.ledger.frames,
            chunk_frames=self.stack.chunk_frames,
        )
        placement = self._checked(layout, self.reindexer.place(layout))
        grid = self.geometry.grid
        whole = [grid_coordinates(p.frames, grid) for p in sink], [grid_coordinates(p.frames, grid) for p in recent]
        mids = [self.stack.compressor.span(0, frames, grid).coordinates for frames, _ in sizes]
        coordinates = [each.to(device) for each in (*whole[0], *mids, *whole[1])]
        ratios = placement.lengths / layout.frames
        positions = [
            _at(each, placement.starts[:, i], ratios[:, i]) for i, each in enumerate(coordinates)
        ] or [torch.zeros(rows, 0, 3, dtype=wide, device=device)]
        current = grid_coordinates(self.stack.chunk_frames, grid).to(device)
        return Turns(
            placement,
            rotations(torch.cat(positions, dim=1), self.geometry),
            self.chunk_turns(placement, current),
        )

    def chunk_turns(self, placement: Placement, coordinates: Float[Tensor, "tokens 3"]) -> Tensor:
        """Rotations of tokens of the current chunk, given where they sit in it."""
        start = placement.chunk_start
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
