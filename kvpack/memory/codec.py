"""In what form compressed blocks are archived, and on which tier."""

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kvpack.errors import KVPackError, OutputError, PolicyError, first_line
from kvpack.memory.attribution import policy_call
from kvpack.memory.policy import Policy

#: Where archived keys and values lie: beside the model, in the host's memory, or in an unnamed file.
Tier = Literal["device", "host", "disk"]
#: Of a block, what is stored by itself.
Half = Literal["keys", "values"]
Stored = tuple[Tensor, ...]
#: Of each tensor that is stored: its size for one block, and its dtype.
Form = tuple[tuple[torch.Size, torch.dtype], ...]


class Codec(Policy, ABC):
    """Say what is stored of archived keys, before RoPE, and values, and what is attended of it.

    Both come as `[blocks, tokens, heads, head_dim]`. What is stored are tensors whose first axis is that of the blocks,
    and whose other sizes and dtypes follow from the shape and dtype alone. Nothing waits for the device. What is not
    finite must not come back as finite.
    """

    role: ClassVar[str] = "codec"

    @abstractmethod
    def encode_keys(self, keys: Float[Tensor, "blocks tokens heads head_dim"]) -> Stored:
        """Return what is stored of keys."""

    @abstractmethod
    def decode_keys(
        self, stored: Sequence[Tensor], tokens: int, dtype: torch.dtype
    ) -> Float[Tensor, "blocks tokens heads head_dim"]:
        """Return keys of what is stored."""

    @abstractmethod
    def encode_values(self, values: Float[Tensor, "blocks tokens heads head_dim"]) -> Stored:
        """Return what is stored of values."""

    @abstractmethod
    def decode_values(
        self, stored: Sequence[Tensor], tokens: int, dtype: torch.dtype
    ) -> Float[Tensor, "blocks tokens heads head_dim"]:
        """Return values of what is stored."""


@dataclass(frozen=True)
class DenseCodec(Codec):
    """Stores keys and values as they are."""

    name = "dense"
    by_head = True

    def encode_keys(self, keys: Tensor) -> Stored:
        """Return the keys."""
        return (keys,)

    def decode_keys(self, stored: Sequence[Tensor], tokens: int, dtype: torch.dtype) -> Tensor:
        """Return the keys, or values."""
        return stored[0]

    def encode_values(self, values: Tensor) -> Stored:
        """Return the values."""
        return (values,)

    decode_values = decode_keys


DENSE = DenseCodec()


def stored_bytes(codec: Codec, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return the bytes of one archived block, computed without any memory; the codec is hashable, as frozen data is.

    >>> stored_bytes(DenseCodec(), 182, 12, 128, torch.bfloat16)
    1118208
    """
    parts = [part for made in form(codec, tokens, heads, head_dim, dtype) for part in made]
    return sum(shape.numel() * kind.itemsize for shape, kind in parts)


@lru_cache(maxsize=256)
def form(codec: Codec, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Form, Form]:
    """Return the form of what a codec stores of a block's keys, and of its values; one that computes takes a while.

    Raises:
        PolicyError: if it stores anything but a tuple of tensors, or gives another shape or dtype back.
    """
    # Planning asks for the form of blocks that nobody has memory for.
    block = torch.empty(1, tokens, heads, head_dim, dtype=dtype, device="meta")
    return _half(codec, "keys", block), _half(codec, "values", block)


def _half(codec: Codec, half: Half, block: Tensor) -> Form:
    encode, decode = f"encode_{half}", f"decode_{half}"
    stored = _without_numbers(codec, encode, block)
    check_stored(codec, encode, stored)
    check_decoded(codec, decode, _without_numbers(codec, decode, stored, block.shape[1], block.dtype), block)
    return tuple((each.shape[1:], each.dtype) for each in stored)


def _without_numbers(codec: Codec, method: str, *given: Any) -> Any:
    try:
        with policy_call(codec, method, {}):
            return getattr(codec, method)(*given)
    except KVPackError:  # its own refusal says more
        raise
    except RuntimeError as error:  # what `.item()` and conditions raise on meta
        raise PolicyError(
            f"{type(codec).__name__}.{method} must work on tensors without numbers (device='meta'), by which memory is "
            f"planned, but raised {first_line(error)!r}; leave out .item() and conditions on numbers"
        ) from error


def check_stored(codec: Codec, method: str, stored: object) -> None:
    """Raise `PolicyError` unless what a codec stores is a tuple of tensors."""
    if not isinstance(stored, tuple) or not all(isinstance(each, Tensor) for each in stored):
        kind = type(stored).__name__
        holds = f" of {', '.join(type(each).__name__ for each in stored)}" if isinstance(stored, tuple | list) else ""
        raise PolicyError(f"{type(codec).__name__}.{method} must return a tuple of tensors, got a {kind}{holds}")


def check_decoded(codec: Codec, method: str, back: object, block: Tensor) -> None:
    """Raise `PolicyError` unless what a codec gives back has the shape and dtype of the block."""
    given = f"{back.dtype} {tuple(back.shape)}" if isinstance(back, Tensor) else f"a {type(back).__name__}"
    wanted = f"{block.dtype} {tuple(block.shape)}"
    if given != wanted:
        raise PolicyError(f"{type(codec).__name__}.{method} must give {wanted} back, as it was, got {given}")


def lengthened(
    block: Float[Tensor, "blocks tokens heads head_dim"], tokens: int
) -> Float[Tensor, "blocks more heads head_dim"]:
    """Return a block of so many tokens, its last one repeated: the least and the greatest numbers in it stay."""
    more = tokens - block.shape[1]
    return torch.cat([block, block[:, -1:].expand(-1, more, -1, -1)], dim=1) if more else block


def room(shape: Sequence[int], dtype: torch.dtype, device: torch.device, tier: Tier) -> Tensor:
    """Return zeros on a tier.

    Raises:
        OutputError: if the disk is full; nothing is left there, neither then nor at the end of the process.
    """
    if tier == "device":
        return torch.zeros(*shape, dtype=dtype, device=device)
    if tier == "host":
        # Pinned for CUDA alone, which then copies without a wait.
        return torch.zeros(*shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    count = torch.Size(shape).numel()
    # Its name goes at the end of the block, the mapping stays: no crash can leave the file behind.
    with tempfile.NamedTemporaryFile(prefix="kvpack-") as file:
        try:
            # Reserved now: a page that the disk has no room for would end the process when it is written.
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, max(1, count * dtype.itemsize))  # 0 bytes are an error
        except OSError as error:
            folder = os.path.dirname(file.name)
            raise OutputError(f"cannot archive in {folder}: {error.strerror}; set TMPDIR to another folder") from error
        # Shared, so that what is written goes to the file and not to memory.
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(*shape)
