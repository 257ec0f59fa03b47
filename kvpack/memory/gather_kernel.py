"""Slots of pinned memory, copied to the device by the device, as a Triton kernel; `index_select` is its reference."""

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

_WORDS = 4096  # copied by a program: 16 kB, if words have 4 bytes


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gather(  # type: ignore[no-untyped-def, unused-ignore]
    stored,
    index,
    out,
    words,
    parts,
    block: tl.constexpr,
):
    """Copy a part of one slot."""
    number, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    # An archive has billions of bytes: whatever is multiplied is widened before.
    number, word = number.to(tl.int64), part.to(tl.int64) * block + tl.arange(0, block)
    there, slot = word < words, tl.load(index + number).to(tl.int64)
    tl.store(out + number * words + word, tl.load(stored + slot * words + word, mask=there), mask=there)


def gather_slots(stored: Tensor, index: Tensor) -> Tensor:
    """Return slots of pinned memory, `[chosen, ...]`, on the device of the index; the host does not wait.

    Whoever writes to that memory on the host must wait for the device first, as a copy from the device does.

    Args:
        stored: contiguous `[slots, ...]`.
        index: `[chosen]`, of slots that are there.
    """
    out = torch.empty(len(index), *stored.shape[1:], dtype=stored.dtype, device=index.device)
    if not out.numel():
        return out
    kind = torch.int32 if out[0].nbytes % 4 == 0 else torch.uint8
    there, here = (each.reshape(len(each), -1).view(kind) for each in (stored, out))  # [slots, words], [chosen, words]
    # Torch hands freed pinned memory on when the streams that its own copies used have come to the end of what they had
    # then. It knows of no kernel, but by this copy of one word, which the kernel copies again, it knows of the stream.
    here[0, :1].copy_(there[0, :1], non_blocking=True)
    words = here.shape[1]
    parts = triton.cdiv(words, _WORDS)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _gather[len(index) * parts,](there, index.contiguous(), here, words, parts, _WORDS)  # pyright: ignore[reportIndexIssue]
    return out
