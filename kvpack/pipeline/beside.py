"""Frames decoded beside the generation: in a thread, on a device of the VAE's own, while the next chunk is denoised."""

import copy
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpack.errors import InvalidOptionError, UnsupportedPipelineError, first_line
from kvpack.generation.chunks import GeneratedChunk
from kvpack.generation.run import Run


def decode_beside(run: Run, device: str | torch.device) -> torch.device:
    """Let a generation hand out latents, and its decoder work on a device; return the device.

    Args:
        run: a generation that has not begun.
        device: of a copy of the VAE; where that is already, it is used itself.

    Raises:
        InvalidOptionError: if there is nothing to decode, or a chunk must be decoded before the next is denoised.
        UnsupportedPipelineError: if the VAE is moved to and fro by offloading, or is not the family's.
    """
    if run._decode is None:
        raise InvalidOptionError('decode_device has nothing to decode with output_type="latent"; leave it out')
    if run.stack.needs_pixels:
        raise InvalidOptionError(
            f"decode_device does not go with {run.stack.name}, which looks at a chunk's frames before the next one is "
            "denoised; leave it out"
        )
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidOptionError(
            f'decode_device must be a device, e.g. "cuda:1" or "cpu" ({first_line(error)})'
        ) from None
    decoder: Any = run._decode
    vae = getattr(decoder, "vae", None)  # another family's decoder may have none
    if vae is None or hasattr(vae, "_hf_hook") or hasattr(vae, "_diffusers_hook"):
        raise UnsupportedPipelineError(
            "decode_device needs a VAE that stays where it is, but this one is offloaded or another family's; load the "
            "pipeline without offloading, or leave decode_device out"
        )
    # "cuda" is not equal to "cuda:0": a tensor tells the full name.
    if vae.device != torch.empty(0, device=where).device:
        # A copy, so that the pipeline's own stays where its next call looks for it.
        decoder.vae = copy.deepcopy(vae).to(where)
    run._decodes_in_loop = False  # chunks come as latents
    return where


def decoded_beside(chunks: Iterator[GeneratedChunk], run: Run, device: torch.device) -> Iterator[GeneratedChunk]:
    """Yield each chunk with its pixels, once the next one is denoised, in whose time they were decoded."""
    waiting: tuple[GeneratedChunk, Future[Tensor]] | None = None
    with closing(chunks), ThreadPoolExecutor(1, "kvpack-decode") as worker:  # type: ignore[type-var]  # a generator
        while True:
            try:
                chunk = next(chunks, None)
            except Exception:
                if waiting is not None and waiting[1].exception() is None:
                    yield replace(waiting[0], pixels=waiting[1].result())  # made before, and whole
                raise
            if chunk is None:
                break
            # Moved here, in the order of this thread's work; another one's would come behind the next chunk's.
            job = worker.submit(run.decode, chunk.latents.to(device))
            if waiting is not None:
                yield replace(waiting[0], pixels=waiting[1].result())
            waiting = chunk, job
        if waiting is not None:
            yield replace(waiting[0], pixels=waiting[1].result())
