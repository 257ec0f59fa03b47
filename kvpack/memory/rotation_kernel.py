"""Rotation in one pass over the bytes, as a Triton kernel; what `rope.rotate` computes elsewhere is its reference."""

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rotate(  # type: ignore[no-untyped-def, unused-ignore]
    vectors,
    turns,
    out,
    tokens,
    v_row,
    v_token,
    v_head,
    t_row,
    t_token,
    t_head,
    o_row,
    o_token,
    o_head,
    half: tl.constexpr,
    pairs: tl.constexpr,
    block: tl.constexpr,
):
    """Rotate all heads of one token."""
    row, token = tl.program_id(0) // tokens, tl.program_id(0) % tokens
    pair = tl.arange(0, block)
    head, place = pair // half, (pair % half)[:, None] * 2 + tl.arange(0, 2)[None, :]  # real and imaginary
    there = (pair < pairs)[:, None]
    # Strides go up to billions of elements: row and token are widened before they are multiplied.
    row, token, head = row.to(tl.int64), token.to(tl.int64), head[:, None]
    vector = tl.load(vectors + row * v_row + token * v_token + head * v_head + place, mask=there, other=0.0)
    turn = tl.load(turns + row * t_row + token * t_token + head * t_head + place, mask=there, other=0.0)
    real, imaginary = tl.split(vector.to(tl.float32))
    cosine, sine = tl.split(turn)
    turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    to = out + row * o_row + token * o_token + head * o_head + place
    tl.store(to, turned.to(out.dtype.element_ty), mask=there)


def rotate_pairs(vectors: Tensor, turns: Tensor, out: Tensor) -> Tensor:
    """Rotate `[rows, tokens, heads, head_dim]` vectors of at most 32 bits in float32, and write them into `out`.

    Args:
        vectors: interleaved pairs, the last axis contiguous.
        turns: complex64 `[rows or 1, tokens, heads or 1, head_dim / 2]`.
        out: as `vectors`; not over them.
    """
    rows, tokens, heads, head_dim = vectors.shape
    if not vectors.numel():
        return out
    half, pairs = head_dim // 2, heads * head_dim // 2
    angles = torch.view_as_real(turns.contiguous())  # (rows or 1, tokens, heads or 1, half, 2)
    # A stride of 0 makes an axis of 1 that of all rows, or all heads.
    shared = [0 if size == 1 else stride for size, stride in zip(angles.shape, angles.stride(), strict=True)]
    strides = *vectors.stride()[:3], *shared[:3], *out.stride()[:3]
    with torch.cuda.device_of(vectors):  # Triton launches on the current device
        grid, block = (rows * tokens,), triton.next_power_of_2(pairs)
        _rotate[grid](vectors, angles, out, tokens, *strides, half, pairs, block)  # pyright: ignore[reportIndexIssue]
    return out
