"""The contract of a codec, tested."""

import torch
from torch import Tensor

from kvpack.errors import PolicyError, first_line
from kvpack.memory.codec import Codec, stored_bytes
from kvpack.plugins.registry import require_instance
from kvpack.testing.watching import watched

_SHAPE = 2, 7, 3, 4  # blocks, tokens, heads, channels


def check_codec(codec: Codec) -> None:
    """Test what a codec stores: sizes that follow from a block's, blocks on their own, and nothing infinite hidden.

    `check_policy` does this too, and runs a stack with it besides.

    Args:
        codec: the codec, with its options set.

    Raises:
        PolicyError: if the contract is broken; the message says how.
        InvalidOptionError: if it is no codec, or a class.
    """
    require_instance("codec", codec)
    name, codec = type(codec).__name__, watched(codec)
    _check_stored(name, codec)
    for dtype in (torch.float32, torch.bfloat16):
        block = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
        counted = _SHAPE[0] * stored_bytes(codec, *_SHAPE[1:], dtype)
        stored = [codec.encode_keys(block), codec.encode_values(block)]
        held = sum(each.nbytes for form in stored for each in form)
        if counted != held:
            raise PolicyError(f"{name} announces {counted} bytes for {_SHAPE[0]} blocks, but stores {held}")
        if not all(each.shape[0] == _SHAPE[0] for form in stored for each in form):
            raise PolicyError(f"{name} stores tensors whose first axis is not that of the blocks")
        if codec.by_head and not all(each.ndim > 2 and each.shape[-2] == _SHAPE[2] for form in stored for each in form):
            raise PolicyError(f"{name} is by_head, so that the last axis but one of all that it stores must be heads")
        for what, back, alone in zip(("keys", "values"), _back(codec, block), _back(codec, block[1:]), strict=True):
            if back.shape != block.shape or back.dtype != dtype:
                raise PolicyError(
                    f"{name} gives {what} {back.dtype} {tuple(back.shape)} back, but they were {dtype} {_SHAPE}"
                )
            lost = float((back.float() - block.float()).norm() / block.float().norm())
            if not lost < 1:
                raise PolicyError(f"{name} gives {what} back that are further off ({lost:.3g} of them) than zeros are")
            if not torch.equal(back[1:], alone):
                raise PolicyError(f"{name} lets blocks influence each other: {what} of one alone were other ones")
    for number in (torch.nan, torch.inf):
        block = torch.ones(_SHAPE)
        block[0, 1, 2, 3] = number
        for what, back in zip(("keys", "values"), _back(codec, block), strict=True):
            if bool(back[0, 1, 2, 3].isfinite()):
                raise PolicyError(f"{name} gives {number} in {what} back as {float(back[0, 1, 2, 3])}, which hides it")


def _check_stored(name: str, codec: Codec) -> None:
    """Check that both halves store tuples of tensors, asked for their form alone, on tensors without numbers."""
    block = torch.empty(_SHAPE, device="meta")
    for method in ("encode_keys", "encode_values"):
        try:
            stored = getattr(codec, method)(block)
        except (RuntimeError, NotImplementedError) as error:
            raise PolicyError(
                f"{name}.{method} must work on tensors without numbers (device='meta'), by which memory is "
                f"planned, but raised {first_line(error)!r}; leave out .item() and conditions on numbers"
            ) from error
        if not isinstance(stored, tuple) or not all(isinstance(each, Tensor) for each in stored):
            raise PolicyError(f"{name}.{method} must return a tuple of tensors, got a {type(stored).__name__}")


def _back(codec: Codec, block: Tensor) -> tuple[Tensor, Tensor]:
    tokens, dtype = block.shape[1], block.dtype
    return (
        codec.decode_keys(codec.encode_keys(block), tokens, dtype),
        codec.decode_values(codec.encode_values(block), tokens, dtype),
    )
