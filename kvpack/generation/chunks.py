"""Chunks of a generation: what comes out of one, how long they are, and the noise of another try."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def rewinding(generator: Any) -> Callable[[], None]:
    """Return what brings the call's generators back to where they are now; noise drawn without one comes anew."""
    generators = generator if isinstance(generator, list) else [generator] if generator is not None else []
    states = [each.get_state() for each in generators]

    def rewind() -> None:
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)

    return rewind


def own_generators(device: torch.device) -> list[torch.Generator]:
    """Return torch's own generators, from which noise comes that is drawn without one: the CPU's, and the device's."""
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


@contextmanager
def watched(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Give what says, behind the block, whether anything in it was drawn from torch's own generators."""
    generators = own_generators(device)
    before = [each.get_state() for each in generators]
    yield lambda: any(not torch.equal(each.get_state(), old) for each, old in zip(generators, before, strict=True))
