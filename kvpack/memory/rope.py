"""Rotary position embedding (arXiv 2104.09864) at any position: fractional, negative or far beyond training.

Angles come from theta, never from a table, in float64 where the device has it: a float32 angle is 2e-3 rad off at
frame 40,000.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from kvpack.memory.geometry import Geometry
from kvpack.memory.kernels import tried

#: Of Wan in bfloat16, keys before and behind and float32 between are 6 MB, which stay in a cache of 8.
_CPU_TOKENS = 512


def wide_dtype(device: torch.device) -> torch.dtype:
    """Widest float that the device computes in."""
    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


def rotations(
    positions: Float[Tensor, "rows tokens 3"] | Float[Tensor, "rows tokens heads 3"], geometry: Geometry
) -> Complex[Tensor, "rows tokens one_or_heads half_head_dim"]:
    """Return unit complex numbers that turn a head's channel pairs to (t, y, x) `positions`, which may differ by head.

    >>> tiny = Geometry(1, 1, 6, (1, 1), (2, 2, 2))
    >>> rotations(torch.zeros(1, 1, 3), tiny).flatten().tolist()
    [(1+0j), (1+0j), (1+0j)]
    """
    places = positions if positions.ndim == 4 else positions.unsqueeze(2)  # [rows, tokens, one or heads, 3]
    angles = _angles(places, geometry) if geometry.rotary is None else geometry.rotary(places)
    # Rounded only now: a large angle needs float64, its cosine does not.
    return torch.complex(angles.cos().float(), angles.sin().float())


def _angles(places: Float[Tensor, "rows tokens one_or_heads 3"], geometry: Geometry) -> Tensor:
    wide = places.to(wide_dtype(places.device))
    # Each axis as often as it has pairs, so that all angles are one product.
    pairs = [
        wide[..., axis, None].expand(*wide.shape[:-1], width // 2) for axis, width in enumerate(geometry.rope_split)
    ]
    return torch.cat(pairs, dim=-1) * _frequencies(geometry.rope_split, geometry.rope_theta, places.device)


@lru_cache(maxsize=16)
def _frequencies(split: tuple[int, ...], theta: float, device: torch.device) -> Float[Tensor, " half_head_dim"]:
    """Return radians that a step along its axis, one of (t, y, x), turns each channel pair."""
    ranges = [torch.arange(0, width, 2, device=device, dtype=wide_dtype(device)) / width for width in split]
    return torch.cat([theta**-exponents for exponents in ranges])


def rotate(
    vectors: Float[Tensor, "batch tokens heads head_dim"],
    turns: Complex[Tensor, "rows tokens one_or_heads half_head_dim"],
    out: Float[Tensor, "batch tokens heads head_dim"] | None = None,
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Rotate queries or keys (interleaved pairs) in float32 or wider and round once; write into `out` if given.

    Gradients pass where `out` is not given.
    """
    # A view as complex numbers wants the two of a pair side by side.
    vectors = vectors if vectors.stride(-1) == 1 else vectors.contiguous()
    if out is None and torch.is_grad_enabled() and vectors.requires_grad:
        wide = vectors if vectors.dtype == torch.float64 else vectors.float()
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # [batch, tokens, heads, half]
        return torch.view_as_real(pairs * turns).flatten(-2).to(vectors.dtype)  # [batch, tokens, heads, head_dim]
    out = torch.empty_like(vectors) if out is None else out
    # Not float64, for the kernel computes in float32.
    fits = vectors.is_cuda and vectors.element_size() <= 4 and out.dtype == vectors.dtype
    kernel = _kernel(vectors.device) if fits else None
    if kernel is not None:
        return kernel(vectors, turns, out)
    # Computed as wide as it is: no buffer.
    if out.dtype == vectors.dtype and vectors.dtype in (torch.float32, torch.float64):
        torch.mul(_as_complex(vectors), turns, out=_as_complex(out))
        return out
    # On a CPU a few tokens at a time, in one float32 buffer that stays in its cache.
    tokens = vectors.shape[1]
    step = min(_CPU_TOKENS, tokens) if vectors.device.type == "cpu" else tokens
    wide = vectors.new_empty(vectors.shape[0], step, *vectors.shape[2:], dtype=torch.float32)
    for start in range(0, tokens, max(1, step)):
        some = slice(start, min(start + step, tokens))
        part = wide[:, : some.stop - start].copy_(vectors[:, some])
        _as_complex(part).mul_(turns[:, some])
        out[:, some].copy_(part)
    return out


@cache
def _kernel(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Return what rotates in one pass on a GPU, if Triton is there and compiles."""

    def launched() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        from kvpack.memory.rotation_kernel import rotate_pairs

        pair = torch.zeros(1, 1, 1, 2, device=device)
        rotate_pairs(pair, _as_complex(pair), torch.empty_like(pair))
        return rotate_pairs

    return tried(launched, "keys are rotated")


def _as_complex(vectors: Tensor) -> Tensor:
    """Return a view of interleaved pairs as complex numbers; no gradient passes."""
    # [batch, tokens, heads, half]
    return vectors.view(torch.complex128 if vectors.dtype == torch.float64 else torch.complex64)


def joined_places(parts: Sequence[Tensor]) -> Tensor:
    """Return places, or rotations, of parts one behind the other, for all rows and heads that any part has.

    Args:
        parts: `[rows or 1, tokens, 3]` and `[rows or 1, tokens, heads or 1, n]`, mixed.
    """
    if any(each.ndim == 4 for each in parts):  # one by head, all by head
        heads = max(each.shape[2] for each in parts if each.ndim == 4)
        parts = [(each if each.ndim == 4 else each[:, :, None]).expand(-1, -1, heads, -1) for each in parts]
    rows = max(each.shape[0] for each in parts)
    return torch.cat([each.expand(rows, *each.shape[1:]) for each in parts], dim=1)
