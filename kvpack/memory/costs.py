"""What compressing a chunk costs, from configs alone."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Cost of one branch of a compressor.

    Args:
        parameters: learned numbers in it.
        flops: floating-point operations for the frames and the video that were asked about.
    """

    parameters: int
    flops: int


@dataclass(frozen=True, eq=False)
class LatentShape:
    """A model's latents, as far as the cost of compressing them depends on them.

    Args:
        channels: channels of a latent.
        patch: latent rows and columns of a token.
        pixels_per_token: height and width in pixels of a token.
        encode_flops: operations of VAE-encoding a clip, given its pixel frames, height and width.
        native: token rows and columns of a token of the model's own embedding for compressed latents; None if it has
            none.
    """

    channels: int
    patch: tuple[int, int]
    pixels_per_token: tuple[int, int]
    encode_flops: Callable[[int, int, int], int]
    native: tuple[int, int] | None = None


def channels_of(latents: LatentShape | None) -> int:
    """Return the channels of a latent; Wan's where a family does not describe its latents."""
    return 16 if latents is None else latents.channels


@dataclass(frozen=True, eq=False)
class ModelCost:
    """What training behind a frozen model depends on.

    Args:
        parameters: numbers in its transformer and its VAE.
        graph_elements: numbers that one forward keeps for the backward pass, given query tokens and attended tokens.
        decode_flops: operations of decoding a video, given its latent frames.
        decoder_elements: numbers that decoding a video chunk by chunk keeps between chunks.
        text_elements: numbers of a caption's embeddings.
    """

    parameters: int
    graph_elements: Callable[[int, int], int]
    decode_flops: Callable[[int], int]
    decoder_elements: int
    text_elements: int
