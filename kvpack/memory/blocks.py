"""What is stored: where tokens come from (`Span`) and their keys and values (`KVBlock`)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kvpack.memory.attribution import broken

#: Where a token sits that stands for a window of cells: at its centre, at its first cell, or at its own index.
Coordinates = Literal["centered", "strided", "compact"]
#: Axes of coordinates, by what a compressor's `places` says.
_AXES = {"span": 2, "row": 3, "head": 4}


@dataclass(frozen=True, eq=False)
class Span:
    """A run of latent frames and the place of every token that stands for it.

    Args:
        first_frame: index of the first latent frame in the video.
        frames: latent frames covered.
        coordinates: (t, y, x) of each token on the full-resolution grid, fractions allowed; t counts from
            `first_frame`.
    """

    first_frame: int
    frames: int
    coordinates: Float[Tensor, "tokens 3"] | Float[Tensor, "rows tokens 3"] | Float[Tensor, "rows tokens heads 3"]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.coordinates.shape[0 if self.coordinates.ndim == 2 else 1]


@dataclass(frozen=True, eq=False)
class KVBlock:
    """Keys before RoPE and values of one layer for one span.

    Args:
        keys: keys after their norm and before RoPE.
        values: values.
        span: where the tokens come from.
        queries: some queries before RoPE of the chunk at whose commit the block is compressed, for a compressor that
            asks for them by its `max_queries`.
        layer: index of the layer, for a compressor that learned something of each.
    """

    keys: Float[Tensor, "batch tokens heads head_dim"]
    values: Float[Tensor, "batch tokens heads head_dim"]
    span: Span
    queries: Float[Tensor, "batch some heads head_dim"] | None = None
    layer: int = 0

    @property
    def own_places(self) -> Tensor | None:
        """Coordinates of the tokens, if they depend on the data: other ones in each row, layer or head."""
        return self.span.coordinates if self.span.coordinates.ndim > 2 else None


def joined(older: KVBlock, newer: KVBlock) -> KVBlock:
    """Return the tokens of two neighbours, which have places of their own, as a block of the frames of both."""
    # In a span t counts from the span's own first frame.
    offset = newer.span.coordinates.new_tensor([newer.span.first_frame - older.span.first_frame, 0, 0])
    places = torch.cat([older.span.coordinates, newer.span.coordinates + offset], dim=1)
    keys, values = torch.cat([older.keys, newer.keys], dim=1), torch.cat([older.values, newer.values], dim=1)
    span = Span(older.span.first_frame, older.span.frames + newer.span.frames, places)
    return replace(older, keys=keys, values=values, span=span)


@dataclass(frozen=True, eq=False)
class LatentChunk:
    """A clean chunk as a latent-space compressor sees it.

    Args:
        latents: normalised clean latents.
        first_frame: index of its first latent frame in the video.
        grid: token rows and columns of one latent frame.
        pixels: decodes the chunk with the stream's own decoder: `[batch, 3, frames, height, width]` in [-1, 1]; only
            for a compressor whose `needs_pixels` is true.
        encode: VAE-encodes pixels to normalised latents.
        embed: the model's own patch embedding, latents to `[batch, tokens, width]`.
        pixels_per_token: height and width in pixels of one token.
        width: channels of a hidden token.
        dtype: dtype of hidden tokens, the model's.
        native: the model's own embedding for compressed latents, as `embed`; None if it has none.
    """

    latents: Float[Tensor, "batch channels frames height width"]
    first_frame: int
    grid: tuple[int, int]
    pixels: Callable[[], Tensor]
    encode: Callable[[Tensor], Tensor]
    embed: Callable[[Tensor], Tensor]
    pixels_per_token: tuple[int, int]
    width: int
    dtype: torch.dtype
    native: Callable[[Tensor], Tensor] | None = None

    @property
    def patch(self) -> tuple[int, int]:
        """Latent rows and columns of a token."""
        return self.latents.shape[3] // self.grid[0], self.latents.shape[4] // self.grid[1]


def cell_centers(cells: int, pooled: int) -> Float[Tensor, " pooled"]:
    """Centres of `pooled` adaptive-pooling windows over `cells` cells.

    >>> cell_centers(4, 2).tolist(), cell_centers(5, 2).tolist()
    ([0.5, 2.5], [1.0, 3.0])
    """
    index = torch.arange(pooled, device="cpu")  # whatever torch's default device is
    start = index * cells // pooled
    # Rounded up, as torch's adaptive pooling: windows overlap rather than leave a cell out.
    stop = -(-(index + 1) * cells // pooled)
    return (start + stop - 1).float() / 2


def window_places(cells: int, pooled: int, coordinates: Coordinates) -> Float[Tensor, " pooled"]:
    """Where the tokens of `pooled` adaptive-pooling windows over `cells` cells sit.

    >>> [window_places(8, 2, each).tolist() for each in ("centered", "strided", "compact")]
    [[1.5, 5.5], [0.0, 4.0], [0.0, 1.0]]
    """
    if coordinates == "centered":
        return cell_centers(cells, pooled)
    index = torch.arange(pooled, device="cpu")
    return (index if coordinates == "compact" else index * cells // pooled).float()


def grid_coordinates(
    frames: int,
    grid: tuple[int, int],
    pooled: tuple[int, int, int] | None = None,
    coordinates: Coordinates = "centered",
) -> Float[Tensor, "tokens 3"]:
    """(t, y, x) of a token grid in row-major order; with `pooled`, of the tokens of its pooling windows.

    >>> grid_coordinates(1, (1, 2)).tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    return _grid(frames, grid, pooled, coordinates).clone()  # a policy may write over it


@cache
def _grid(
    frames: int, grid: tuple[int, int], pooled: tuple[int, int, int] | None, coordinates: Coordinates
) -> Float[Tensor, "tokens 3"]:
    sizes = (frames, *grid)
    axes = [window_places(size, cells, coordinates) for size, cells in zip(sizes, pooled or sizes, strict=True)]
    return torch.cartesian_prod(*axes).reshape(-1, 3)  # (t, y, x) of frames * rows * columns


def check_block(
    compressor: object, block: object, span: Span, like: Tensor, layer: int, method: str = "compress"
) -> None:
    """Raise `PolicyError` if a compressor's block is not what its span announces."""
    wrong = partial(broken, compressor, method, layer=layer)
    announces = "shrunk_span()" if method == "shrunk" else "span()"
    if not isinstance(block, KVBlock):
        raise wrong(type(block).__name__, "it must be a KVBlock")
    wanted = (like.shape[0], span.tokens, *like.shape[2:])
    for what, tensor in (("keys", block.keys), ("values", block.values)):
        if not isinstance(tensor, Tensor):
            raise wrong(f"{what} {type(tensor).__name__}", "it must be a tensor")
        if tuple(tensor.shape) != wanted:
            raise wrong(f"{what} {tuple(tensor.shape)}", f"{announces} announces {wanted}")
        if tensor.dtype != like.dtype:
            raise wrong(f"{what} {tensor.dtype}", f"the model's dtype is {like.dtype}")
    places, rows = block.own_places, (like.shape[0], span.tokens)
    if places is not None and tuple(places.shape) not in ((*rows, 3), (*rows, like.shape[2], 3)):
        own = f"{(*rows, 3)}, or {(*rows, like.shape[2], 3)} where heads differ"
        raise wrong(f"places {tuple(places.shape)}", f"tokens of its own have {own}")
    if method == "shrunk":
        return
    said = getattr(compressor, "places", "span")
    axes, why = _AXES.get(said, 0), f"for its places is {said!r}"
    if method == "merged":
        axes, why = span.coordinates.ndim, "as those of what it is given"
    if block.span.coordinates.ndim != axes:  # plans count bytes by it
        raise wrong(
            f"places {tuple(block.span.coordinates.shape)}",
            f"they must have {axes} axes, {why}: (tokens, 3) are 'span', rows stand before them in 'row', and heads "
            "between them in 'head'",
        )
