"""The contract of a codec, tested."""

import torch
from torch import Tensor

from kvpack.errors import PolicyError
from kvpack.memory.codec import Codec, check_decoded, check_stored, stored_bytes
from kvpack.plugins.registry import require_instance
from kvpack.testing.faults import named_failure, require_data
from kvpack.testing.watching import watched

_SHAPE = 2, 7, 3, 4  # blocks, tokens, heads, channels
_HALVES = "keys", "values"


def check_codec(codec: Codec) -> None:
    """Test what a codec stores: sizes that follow from a block's, blocks on their own, and nothing infinite hidden.

    `check_policy` does this too, and runs a stack with it besides.

    Raises:
        PolicyError: if the contract is broken; the message says how.
        InvalidOptionError: if it is no codec, or a class.
    """
    require_instance("codec", codec)
    require_data(codec)
    codec = watched(codec)
    for dtype in (torch.float32, torch.bfloat16):
        with named_failure(codec, dtype):
            _check_blocks(codec, dtype)
    with named_failure(codec, torch.float32):
        _check_not_finite(codec)


def _check_blocks(codec: Codec, dtype: torch.dtype) -> None:
    """Check what it stores of two blocks, and what it gives back of both and of one alone."""
    name, (blocks, tokens, heads, channels) = type(codec).__name__, _SHAPE
    numbers = torch.randn(blocks, heads, tokens, channels, generator=torch.Generator().manual_seed(0))
    block = numbers.to(dtype).transpose(1, 2)  # keys that a model gives need not be contiguous
    counted = _SHAPE[0] * stored_bytes(codec, *_SHAPE[1:], dtype)  # on tensors without numbers
    stored = [codec.encode_keys(block), codec.encode_values(block)]
    for half, each in zip(_HALVES, stored, strict=True):
        check_stored(codec, f"encode_{half}", each)
    held = sum(each.nbytes for form in stored for each in form)
    if counted != held:
        raise PolicyError(f"{name} announces {counted} bytes for {_SHAPE[0]} blocks, but stores {held}")
    if not all(each.shape[0] == _SHAPE[0] for form in stored for each in form):
        raise PolicyError(f"{name} stores tensors whose first axis is not that of the blocks")
    if codec.by_head and not all(each.ndim > 2 and each.shape[-2] == _SHAPE[2] for form in stored for each in form):
        raise PolicyError(f"{name} is by_head, so that the last axis but one of all that it stores must be heads")
    for half, back, alone in zip(_HALVES, _back(codec, block), _back(codec, block[1:]), strict=True):
        check_decoded(codec, f"decode_{half}", back, block)
        lost = float((back.float() - block.float()).norm() / block.float().norm())
        if not lost < 1:
            raise PolicyError(f"{name} gives {half} back that are further off ({lost:.3g} of them) than zeros are")
        if not torch.equal(back[1:], alone):
            raise PolicyError(f"{name} lets blocks influence each other: {half} of one alone were other ones")


def _check_not_finite(codec: Codec) -> None:
    """Check that what is not finite does not come back as finite."""
    for number in (torch.nan, torch.inf):
        block = torch.ones(_SHAPE)
        block[0, 1, 2, 3] = number
        for half, back in zip(_HALVES, _back(codec, block), strict=True):
            if bool(back[0, 1, 2, 3].isfinite()):
                raise PolicyError(
                    f"{type(codec).__name__} gives {number} in {half} back as {float(back[0, 1, 2, 3])}, which hides it"
                )


def _back(codec: Codec, block: Tensor) -> tuple[Tensor, Tensor]:
    tokens, dtype = block.shape[1], block.dtype
    return (
        codec.decode_keys(codec.encode_keys(block), tokens, dtype),
        codec.decode_values(codec.encode_values(block), tokens, dtype),
    )
