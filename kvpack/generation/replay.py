"""The last committed frames as they were generated, from which a replay computes keys and values anew."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from kvpack.memory.ledger import BlockEntry


@dataclass(frozen=True, eq=False)
class CleanFrames:
    """An immutable value; `with_chunk` returns the next one.

    Args:
        most_frames: latent frames that are kept; 0 keeps nothing.
        latents: clean latents of each chunk, oldest first.
        pixels: the last pixel frame of each latent frame, for a memory that encodes one anew.
        tokens: hidden tokens that a compressor made of these chunks' pieces.
        frames: latent frames there have been in all.
    """

    most_frames: int
    latents: tuple[Float[Tensor, "batch channels _ height width"], ...] = ()
    pixels: tuple[Float[Tensor, "batch 3 _ pixel_height pixel_width"], ...] = ()
    tokens: Mapping[BlockEntry, Float[Tensor, "batch tokens hidden"]] = field(default_factory=dict)
    frames: int = 0

    def with_chunk(self, latents: Tensor, tokens: Mapping[BlockEntry, Tensor], pixels: Tensor | None) -> "CleanFrames":
        """Return these and a chunk behind them, without what is too old for any replay."""
        if not self.most_frames:
            return self
        kept = [*self.latents, latents]
        # Whole chunks: one that a replay only ends in stays.
        while sum(each.shape[2] for each in kept[1:]) >= self.most_frames:
            del kept[0]
        frames = self.frames + latents.shape[2]
        oldest = frames - sum(each.shape[2] for each in kept)
        seen = [] if pixels is None else [_last_of_each(pixels, latents.shape[2], first=not self.frames)]
        return replace(
            self,
            latents=tuple(kept),
            pixels=(*self.pixels, *seen)[-len(kept) :],
            # Compressed once: a replay runs the same tokens through the layers anew.
            tokens={piece: each for piece, each in {**self.tokens, **tokens}.items() if piece.first_frame >= oldest},
            frames=frames,
        )

    def last(self, frames: int) -> Tensor:
        """Return clean latents of the last frames."""
        return torch.cat(self.latents, dim=2)[:, :, -frames:]

    def last_pixels(self, frames: int) -> Tensor:
        """Return the last pixel frame of each of the last latent frames."""
        return torch.cat(self.pixels, dim=2)[:, :, -frames:]


def _last_of_each(pixels: Tensor, frames: int, *, first: bool) -> Tensor:
    """Return the last pixel frame of each latent frame; a video's first one stands for a single pixel frame."""
    if frames == 1:  # of one frame no scale can be told
        return pixels[:, :, -1:]
    count = pixels.shape[2]
    scale = (count - 1) // (frames - 1) if first else count // frames
    return pixels[:, :, (count - 1) % scale :: scale]  # 0, 4, 8 in a video's first chunk, and 3, 7, 11 in others
