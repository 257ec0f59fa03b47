"""Chunks of a generation: what comes out of one, how long they are, and the noise of another try."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvpack.errors import InvalidOptionError
from kvpack.memory.base import Memory


@dataclass(frozen=True, eq=False)
class GeneratedChunk:
    """A generated chunk.

    Args:
        index: number of the chunk.
        latents: clean latents, already trimmed to the frames asked for.
        pixels: decoded frames in [-1, 1], or None if nobody needed them yet.
    """

    index: int
    latents: Float[Tensor, "batch channels frames height width"]
    pixels: Float[Tensor, "batch 3 pixel_frames pixel_height pixel_width"] | None


def with_chunk_frames(stack: Memory, frames: int, option: str) -> Memory:
    """Return the same memory for chunks of `frames` latent frames.

    Args:
        stack: the memory.
        frames: latent frames of a chunk.
        option: argument of the call that asks for them, which an error names.

    Raises:
        InvalidOptionError: if the memory cannot have chunks of this length.
    """
    if frames == stack.chunk_frames:
        return stack
    try:
        return replace(stack, chunk_frames=frames)  # type: ignore[type-var]  # what is no dataclass raises
    except (TypeError, ValueError) as error:
        raise InvalidOptionError(
            f"{option} {frames} does not go with the chunks of {stack.chunk_frames} latent frames of the stack "
            f"{stack.name} ({error}); pass {option}={stack.chunk_frames}, or enable a stack with chunk_frames={frames}"
        ) from error


def require_generators(given: Any) -> None:
    """Raise `InvalidOptionError` unless noise is drawn from a torch generator, from one for each video, or from None.

    >>> require_generators([torch.Generator(), torch.Generator()])
    """
    for each in given if isinstance(given, list | tuple) and given else [given]:
        if each is not None and not isinstance(each, torch.Generator):
            seed = each if isinstance(each, int) else 0
            raise InvalidOptionError(
                f"generator must be a torch.Generator, or a list of one for each video, got {given!r}; "
                f"e.g. torch.Generator().manual_seed({seed})"
            )


def rewinding(generator: Any) -> Callable[[], None]:
    """Return what brings the call's generators back to where they are now; noise drawn without one comes anew."""
    generators = generator if isinstance(generator, list) else [generator] if generator is not None else []
    states = [each.get_state() for each in generators]

    def rewind() -> None:
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)

    return rewind
