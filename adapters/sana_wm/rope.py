"""Angles of LTX-2's RoPE, which counts seconds and pixels and whose frequencies run over all heads."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_AXES = 3


@dataclass(frozen=True)
class LTX2Rotary:
    """Angles to the very bits of `SanaWMLTX2AudioVideoRotaryPosEmbed`, in its own float32, at fractional places too.

    Upstream clamps times at 0, so that the first frame, which stands for one pixel frame, is half as long as the rest.
    Positions below 0, which upstream never asks for, go on from there at a frame's full length.

    Args:
        heads: attention heads.
        head_dim: channels of a head.
        pixels: pixel frames, rows and columns of a token.
        extents: seconds, rows and columns that are position 1.
        causal_offset: pixel frames of the first latent frame.
        theta: ratio of the highest frequency to the lowest.
        double_precision: whether frequencies are computed in float64 before they are rounded.
        fps: pixel frames a second.
    """

    heads: int
    head_dim: int
    pixels: tuple[int, int, int] = (8, 32, 32)
    extents: tuple[int, int, int] = (20, 2048, 2048)
    causal_offset: int = 1
    theta: float = 10000.0
    double_precision: bool = True
    fps: float = 24.0

    def __call__(self, positions: Tensor) -> Tensor:
        """Return angles `[rows, tokens, heads, head_dim / 2]` of places `[rows, tokens, 1 or heads, 3]`."""
        places = positions.float()
        # Upstream's order of operations from here on: another rounds otherwise.
        middles = [self._seconds(places[..., 0])]
        middles += [(places[..., axis] + (places[..., axis] + 1)) * self.pixels[axis] / 2.0 for axis in (1, 2)]
        parts = [middle / extent for middle, extent in zip(middles, self.extents, strict=True)]
        signed = torch.stack(parts, dim=-1) * 2 - 1  # -1 to 1 over the extents
        frequencies, axes = self._channels(positions.device)
        rows, tokens = positions.shape[:2]
        signed = signed.expand(rows, tokens, self.heads, _AXES)
        return signed.gather(-1, axes.expand(rows, tokens, *axes.shape)) * frequencies

    def _seconds(self, frames: Tensor) -> Tensor:
        """Return the middle of each frame's time."""
        long, offset = self.pixels[0], self.causal_offset
        start = (frames * long + offset - long).clamp(min=0) / self.fps
        end = ((frames + 1) * long + offset - long).clamp(min=0) / self.fps
        first = (max(0, offset - long) + max(0, offset)) / 2 / self.fps
        return torch.where(frames < 0, first + frames * long / self.fps, (start + end) / 2.0)

    def _channels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return frequency and axis of each head's channel pairs; axes take turns, spare pairs come first."""
        pairs = self.heads * self.head_dim // 2
        steps = pairs // _AXES
        dtype = torch.float64 if self.double_precision else torch.float32
        # Radians at the end of an extent: pi / 2 to theta * pi / 2.
        powers = torch.pow(self.theta, torch.linspace(0.0, 1.0, steps, dtype=dtype, device=device))
        frequencies = (powers * math.pi / 2.0).float().repeat_interleave(_AXES)
        still = pairs - frequencies.shape[0]
        axes = (torch.arange(pairs, device=device) - still) % _AXES  # of the spare ones any, for their frequency is 0
        return pad(frequencies, (still, 0)).view(self.heads, -1), axes.view(self.heads, -1)  # [heads, half] each
