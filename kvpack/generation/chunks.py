"""Chunks of a generation: what comes out of one, how long they are, and the noise of another try."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvpack.errors import InvalidOptionError, NonFiniteLatentsError
from kvpack.logging import get_logger
from kvpack.memory.base import Memory

if TYPE_CHECKING:
    from kvpack.generation.run import Run

logger = get_logger(__name__)
#: How often a chunk that holds NaN is made again, where it is at all.
NAN_RETRIES = 3


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


def pixel_frames(frames: int, first: int, scale: int) -> int:
    """Return the pixel frames of latent frames from `first` on; the video's first latent frame stands for one alone.

    >>> pixel_frames(3, 0, 4), pixel_frames(3, 3, 4), pixel_frames(0, 0, 4)
    (9, 12, 0)
    """
    return max(0, frames * scale - (scale - 1 if first == 0 else 0))


def trimmed(chunk: GeneratedChunk, total_frames: int | None, first: int, scale: int) -> GeneratedChunk:
    """Return a chunk without what lies beyond the video's end.

    Args:
        chunk: the chunk.
        total_frames: latent frames of the whole video; None if it is endless.
        first: the chunk's first latent frame.
        scale: pixel frames of a latent frame, of which the video's first stands for one alone.
    """
    keep = chunk.latents.shape[2] if total_frames is None else min(chunk.latents.shape[2], total_frames - first)
    pixels = chunk.pixels
    if pixels is not None:
        pixels = pixels[:, :, : pixel_frames(keep, first, scale)]
    return replace(chunk, latents=chunk.latents[:, :, :keep], pixels=pixels)


def finite(run: "Run", index: int, first: int, frames: int) -> GeneratedChunk:
    """Return what `run.generated` does; where the run retries NaN, a chunk that holds it is made of other noise.

    The noise is what the call's generator draws next, for all videos of the batch.

    Raises:
        NonFiniteLatentsError: if the last try holds NaN or infinity too.
    """
    for left in reversed(range(1 + NAN_RETRIES if run.retries_nan else 1)):
        try:
            return run.generated(index, first, frames)
        except NonFiniteLatentsError as error:
            if not left:
                raise
            logger.warning(f"{str(error).partition(';')[0]}; it is made again of other noise, {left} tries are left")
            run.denoiser.forget_chunk()  # what layers have chosen by queries that were NaN
            prolong(run)
    raise AssertionError  # the last try returns or raises


def prolong(run: "Run") -> None:
    """Let the progress bar wait for one more try of a chunk; that of a video without end has no total."""
    # Tqdm makes None of a total without end.
    if run._bar.total is not None:
        run._bar.total += run.steps


def require_room(given: Tensor | None, total_frames: int | None) -> Tensor | None:
    """Return the latents that a video begins with, if it has frames beside them.

    Raises:
        InvalidOptionError: if nothing would be left to generate.
    """
    if given is not None and total_frames is not None and given.shape[2] >= total_frames:
        raise InvalidOptionError(
            f"what is given has {given.shape[2]} latent frames, but the whole video has {total_frames}; "
            "give a larger num_frames, which counts those that are given"
        )
    return given


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
    for each in given if isinstance(given, list) and given else [given]:
        if each is not None and not isinstance(each, torch.Generator):
            seed = each if isinstance(each, int) else 0
            raise InvalidOptionError(
                f"generator must be a torch.Generator, or a list of one for each video, got {given!r}; "
                f"e.g. torch.Generator().manual_seed({seed})"
            )


def rewinding(generator: Any) -> Callable[[], None]:
    """Return what brings the call's generators back to where they are now; noise drawn without one comes anew."""
    generators = generator if isinstance(generator, list) else [generator] if generator is not None else []
    states = [each.get_state() for each in generators]  # copies, at this moment

    def rewind() -> None:
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)

    return rewind


def own_generators() -> list[torch.Generator]:
    """Return torch's own generators, from which noise comes that is drawn without one: the CPU's, and those of GPUs."""
    # A device that was never used has drawn nothing, and asking would make a context on it.
    kinds = [each for each in (torch.cuda, torch.xpu) if each.is_available() and each.is_initialized()]
    mps = [torch.mps._get_default_mps_generator()] if torch.backends.mps.is_available() else []
    return [torch.default_generator, *mps, *(each for kind in kinds for each in kind.default_generators)]


@contextmanager
def watched() -> Iterator[Callable[[], bool]]:
    """Give what says, behind the block, whether anything in it was drawn from torch's own generators."""
    generators = own_generators()
    before = [each.get_state() for each in generators]
    yield lambda: any(not torch.equal(each.get_state(), old) for each, old in zip(generators, before, strict=True))
