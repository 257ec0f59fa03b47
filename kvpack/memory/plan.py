"""A chunk in host integers: what came before it, how long it is, where it sits. No model is needed."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.memory.rope import rotations, wide_dtype
from kvpack.memory.sending import sent


@dataclass(frozen=True)
class Book:
    """The past of a generation as far as host integers say it.

    Args:
        frames: committed latent frames.
        chunks: committed chunks.
        seconds: spent inside each policy's methods, by its class name; all books of one generation count in one dict.
    """

    frames: int = 0
    chunks: int = 0
    seconds: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    def counting(self, seconds: dict[str, float]) -> "Book":
        """Return the same past in a book that counts in `seconds`; a new dict counts from here on."""
        return replace(self, seconds=seconds)


class Plan:
    """What is known of a coming chunk before any forward, the same for all layers."""

    def __init__(self, book: Book, coming: int, geometry: Geometry) -> None:
        self.book, self.coming, self.geometry = book, coming, geometry
        self._coordinates: dict[torch.device, Tensor] = {}
        #: Rotations by the tensor, or number, that they come from, which is kept so that it stays the only one.
        self._rotations: dict[object, tuple[object, Tensor]] = {}

    def room(self) -> tuple[int, int]:
        """Return the keys and values that arenas should have room for; they grow if that is not enough."""
        return 0, 0

    def prefetch(self, state: Any) -> None:
        """Begin to bring to the device what the next layer will read of its state, as the last one did.

        Args:
            state: that layer's; None behind the last layer.
        """

    def coordinates(self, device: torch.device) -> Float[Tensor, "1 tokens 3"]:
        """Return (t, y, x) of the chunk's tokens in the video, the same tensor for all layers."""
        if device not in self._coordinates:
            # A copy, since it is written over in the next line.
            grid = sent(grid_coordinates(self.coming, self.geometry.grid), device).to(wide_dtype(device), copy=True)
            grid[:, 0] += self.book.frames
            self._coordinates[device] = grid[None]
        return self._coordinates[device]

    def chunk_rotations(
        self, start: float | Tensor, device: torch.device
    ) -> Complex[Tensor, "rows chunk one_or_heads half"]:
        """Return the rotations of the chunk's tokens; layers that give the same `start` share them.

        Args:
            start: temporal position of the chunk's first frame, one for all rows or `[rows]`.
            device: where they are needed.
        """
        # By identity: to compare values would wait for the device.
        key = (id(start) if isinstance(start, Tensor) else start, device)
        if key not in self._rotations:
            if isinstance(start, Tensor):
                places = at(grid_coordinates(self.coming, self.geometry.grid), start, torch.ones_like(start))
            else:
                places = self.coordinates(device).clone()  # the chunk's own are shared by all layers
                places[..., 0] += start - self.book.frames
            self._rotations[key] = start, rotations(places, self.geometry)
        return self._rotations[key][1]


def at(
    coordinates: Float[Tensor, "tokens 3"] | Float[Tensor, "rows tokens 3"] | Float[Tensor, "rows tokens heads 3"],
    start: Float[Tensor, " rows"] | Float[Tensor, "rows tokens"],
    ratio: Float[Tensor, " rows"] | Float[Tensor, "rows tokens"],
) -> Float[Tensor, "rows tokens 3"] | Float[Tensor, "rows tokens heads 3"]:
    """Return (t, y, x) positions of tokens whose block starts at `start` and is squeezed by `ratio`.

    Args:
        coordinates: of each token in its block.
        start: position of a row's block, or of the block of each token.
        ratio: positions that a frame of the block spans, alike.
    """
    coordinates = sent(coordinates, start.device)
    begins, squeezed = (each[:, None] if each.ndim == 1 else each for each in (start, ratio))
    if coordinates.ndim == 4:
        begins, squeezed = begins[..., None], squeezed[..., None]
    # As in `Placement`: frames sit in the centres of their shares, so that a squeezed block fills its positions.
    time = begins + (coordinates[..., 0] + 0.5) * squeezed - 0.5
    place = coordinates[..., 1:].to(time.dtype).expand(*time.shape, 2)
    return torch.cat([time[..., None], place], dim=-1)
