"""Archived keys and values in eight or fewer bits (after KIVI, arXiv 2402.02750)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory.codec import Codec, Stored, lengthened

_LARGEST = torch.finfo(torch.float16).max  # 65504: steps and least numbers are stored in float16


@dataclass(frozen=True)
class Int8Codec(Codec):
    """Stores whole numbers between the least and the greatest of a group: keys by channel, values by token.

    A channel of keys before RoPE is alike in all tokens, also where it is far from the others, and a token's values are
    of one size. Least number and step are float16, so that numbers beyond its range, 65504, are cut. Differs from KIVI:
    a group is about `group_tokens` tokens of a channel, or all channels of a head of a token, and nothing recent is
    kept apart, since it is not archived. A number is off by at most half a step, 2^-9 of the largest of its group, and
    2^-16 where they are tiny.

    Args:
        group_tokens: most tokens whose keys share a step in each channel.

    Raises:
        InvalidOptionError: if `group_tokens` is less than 1.
    """

    group_tokens: int = 64
    name = "int8"
    by_head = True
    bits: ClassVar[int] = 8

    def __post_init__(self) -> None:
        require_int("group_tokens", self.group_tokens, minimum=1)

    def encode_keys(self, keys: Tensor) -> Stored:
        """Return codes `[blocks, groups, tokens, heads, head_dim]`, and least number and step of each group."""
        groups, size = self._groups(keys.shape[1])
        # Groups of one size: the last token is repeated, which changes neither least nor greatest.
        grouped = lengthened(keys, groups * size).unflatten(1, (groups, size))
        return self._encode(grouped, dim=2)  # [blocks, groups, tokens, heads, head_dim]

    def decode_keys(self, stored: Sequence[Tensor], tokens: int, dtype: torch.dtype) -> Tensor:
        """Return keys."""
        return self._decode(stored, dtype).flatten(1, 2)[:, :tokens]  # [blocks, tokens, heads, head_dim]

    def encode_values(self, values: Tensor) -> Stored:
        """Return codes `[blocks, tokens, heads, head_dim]`, and least number and step of each token's heads."""
        return self._encode(values, dim=3)

    def decode_values(self, stored: Sequence[Tensor], tokens: int, dtype: torch.dtype) -> Tensor:
        """Return values."""
        return self._decode(stored, dtype)

    def _groups(self, tokens: int) -> tuple[int, int]:
        """Return how many groups there are, of equal size, and of how many tokens."""
        groups = -(-tokens // self.group_tokens)
        return groups, -(-tokens // groups)

    def _encode(self, numbers: Tensor, dim: int) -> Stored:
        numbers, levels = numbers.float(), 2**self.bits - 1
        # What is not finite comes back as NaN, with its group.
        numbers = torch.where(numbers.isfinite(), numbers.clamp(-_LARGEST, _LARGEST), torch.nan)
        least, greatest = numbers.amin(dim, keepdim=True), numbers.amax(dim, keepdim=True)
        start = least.half()
        # Halves first: from the least to the greatest float16 is more than float16 holds.
        step = ((greatest / 2 - start.float() / 2) / levels * 2).half()
        # By the rounded start and step, which are what decoding has.
        codes = (numbers - start.float()) / torch.where(step > 0, step, 1).float()
        return self._packed(codes.round().clamp(0, levels).to(torch.uint8)), start, step

    def _decode(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        codes, start, step = stored
        return torch.addcmul(start.float(), self._unpacked(codes), step.float()).to(dtype)

    def _packed(self, codes: Tensor) -> Tensor:
        return codes

    def _unpacked(self, codes: Tensor) -> Tensor:
        return codes


@dataclass(frozen=True)
class Int4Codec(Int8Codec):
    """Stores as `Int8Codec`, in sixteen levels, two channels in a byte."""

    name = "int4"
    bits: ClassVar[int] = 4

    def _packed(self, codes: Tensor) -> Tensor:
        return codes[..., ::2] | codes[..., 1::2] << 4  # head_dim is even, as RoPE turns pairs

    def _unpacked(self, codes: Tensor) -> Tensor:
        return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)  # [..., heads, head_dim]


@dataclass(frozen=True)
class ResidualCodec(Int8Codec):
    """Stores as `Int8Codec`, in stages of two bits: each has what is left by the one before, in a quarter of its step.

    After progressive residual quantisation (Quant VideoGen, arXiv 2602.02958). Differs from it: no stage has centroids,
    nor steps of its own, which cost more bytes than they save. So two stages are as exact as `int4`, four as `int8`,
    and three lie between them. Four channels of a stage are a byte.

    Args:
        stages: how many, 1 to 4.

    Raises:
        InvalidOptionError: if `group_tokens` is less than 1, or `stages` out of range; as a generation begins, if the
            channels of a head are no multiple of 4.
    """

    stages: int = 3
    name = "residual"

    def __post_init__(self) -> None:
        super().__post_init__()
        if require_int("stages", self.stages, minimum=1) > 4:
            raise InvalidOptionError(f"stages must be at most 4, which are 8 bits, got {self.stages}")

    @property
    def bits(self) -> int:  # type: ignore[override]  # follows from an option
        """Bits of a number."""
        return 2 * self.stages

    def _packed(self, codes: Tensor) -> Tensor:
        if codes.shape[-1] % 4:
            raise InvalidOptionError(
                f"store residual packs four channels in a byte, but heads have {codes.shape[-1]}; take int4 or int8"
            )
        stages = torch.stack([codes >> 2 * stage & 3 for stage in range(self.stages)], dim=-2)
        # [..., heads, stages, head_dim / 4]; heads are the last axis but one of all that a codec by head stores
        packed = stages[..., ::4] | stages[..., 1::4] << 2 | stages[..., 2::4] << 4 | stages[..., 3::4] << 6
        return packed.flatten(-2)  # [..., heads, stages * head_dim / 4]

    def _unpacked(self, codes: Tensor) -> Tensor:
        packed = codes.unflatten(-1, (self.stages, -1))  # [..., heads, stages, head_dim / 4]
        parts = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
        stages = parts.flatten(-2)  # [..., heads, stages, head_dim]
        first, *others = stages.unbind(-2)
        for stage, left in enumerate(others, 1):
            first = first | left << 2 * stage
        return first


@dataclass(frozen=True)
class Float8Codec(Codec):
    """Stores float8 (e4m3), scaled by the largest number of each channel of keys and of each head of a token's values.

    A number is off by at most 2^-4 of itself, and 2^-9 of a step where it is tiny.
    """

    name = "fp8"
    by_head = True

    def encode_keys(self, keys: Tensor) -> Stored:
        """Return float8 numbers as bytes, and a scale for each channel."""
        return self._encode(keys, dim=1)

    def decode_keys(self, stored: Sequence[Tensor], tokens: int, dtype: torch.dtype) -> Tensor:
        """Return keys."""
        numbers, scale = stored
        return (numbers.view(torch.float8_e4m3fn).float() * scale).to(dtype)

    def encode_values(self, values: Tensor) -> Stored:
        """Return float8 numbers as bytes, and a scale for each head of a token."""
        return self._encode(values, dim=3)

    decode_values = decode_keys

    def _encode(self, numbers: Tensor, dim: int) -> Stored:
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = numbers.float().abs().amax(dim, keepdim=True) / largest
        scaled = numbers.float() / torch.where(scale == 0, 1, scale)
        # Bytes, since what indexes and copies tensors does not take float8 everywhere.
        return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8), scale
