"""Arguments of a `SanaWMLTX2Refiner`'s call, checked before anything is computed, and its prompt encoded."""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpack.errors import InvalidOptionError, NonFiniteLatentsError, require_choice, require_int
from kvpack.generation.prompts import Shot


@dataclass(frozen=True, eq=False)
class Text:
    """What the transformer is told of a prompt; its length is the batch.

    Args:
        embeds: text embeddings `[batch, tokens, width]`.
        mask: 1 where a token counts, `[batch, tokens]`.
    """

    embeds: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.embeds)


def checked(pipeline: Any, arguments: dict[str, Any], *, streaming: bool) -> dict[str, Any]:
    """Return all arguments of the pipeline's call, with a generator.

    Raises:
        InvalidOptionError: if an argument cannot work.
        NonFiniteLatentsError: if `sana_latent` holds NaN or infinity.
    """
    call = dict(arguments)
    if pipeline.vae is None:
        call["output_type"] = "latent"  # whatever was asked for, as upstream
    for name in ("sink_size", "block_size"):
        call[name] = require_int(name, call[name], minimum=1)
    if call["sink_size"] > call["block_size"]:
        raise InvalidOptionError(
            f"sink_size must be at most block_size {call['block_size']}, got {call['sink_size']}; "
            "keep more frames for good by the stack's sink_frames"
        )
    if pipeline.packforcing.first_chunk_frames not in (None, call["sink_size"]):
        raise InvalidOptionError(
            f"the refiner's first chunk is its sink; give sink_size={pipeline.packforcing.first_chunk_frames} to the "
            f"call in the place of packforcing.first_chunk_frames, got {call['sink_size']}"
        )
    trained = inspect.signature(pipeline._kvpack_base.__call__).parameters["kv_max_frames"].default
    if call["kv_max_frames"] != trained:
        raise InvalidOptionError(
            f"kv_max_frames is the stock pipeline's window, got {call['kv_max_frames']}, but this pipeline's memory is "
            f'its stack; give the stack\'s options, e.g. enable_packforcing("sana-wm", '
            f"window_frames={call['kv_max_frames']})"
        )
    require_choice("output_type", call["output_type"], ("latent", "np", "pt", "pil"))
    if not (isinstance(call["fps"], int | float) and math.isfinite(call["fps"]) and call["fps"] > 0):
        raise InvalidOptionError(f"fps must be a number > 0, got {call['fps']!r}")
    if len(call["sigmas"]) < 2:
        raise InvalidOptionError(f"sigmas need a step at least, e.g. (0.9, 0.0), got {call['sigmas']!r}")
    if streaming and call["output_type"] != "latent":
        raise InvalidOptionError(
            "the refiner's decoder looks at frames to come, so pixels cannot be streamed; "
            'stream with output_type="latent" and decode the whole afterwards'
        )
    _check_latents(pipeline, call)
    if call["generator"] is None:  # one for all blocks, as upstream's
        call["generator"] = torch.Generator(device=pipeline._execution_device).manual_seed(42)
    return call


def _check_latents(pipeline: Any, call: dict[str, Any]) -> None:
    latents, config = call["sana_latent"], pipeline.transformer.config
    channels, patch = config.in_channels // config.patch_size**2, config.patch_size
    shape = tuple(getattr(latents, "shape", ()))
    if len(shape) != 5 or shape[1] != channels or 0 in shape or shape[3] % patch or shape[4] % patch:
        raise InvalidOptionError(
            f"sana_latent must be [batch, {channels} channels, frames, height, width] with height and width multiples "
            f"of {patch}, got {list(shape) or type(latents).__name__}"
        )
    if shape[2] <= call["sink_size"]:
        raise InvalidOptionError(
            f"sana_latent must have more frames than sink_size={call['sink_size']}, got {shape[2]}"
        )
    if shape[0] > 1 and call["output_type"] != "latent":
        raise InvalidOptionError(
            f"the refiner returns pixels of one video, but sana_latent has a batch of {shape[0]}; "
            'give output_type="latent"'
        )
    if not bool(latents.isfinite().all()):
        raise NonFiniteLatentsError("sana_latent holds NaN or infinity; give finite latents")


def require_texts(schedule: list[Shot]) -> list[Shot]:
    """Return the shots if the prompt of each is one text, and raise `InvalidOptionError` if not."""
    for shot in schedule:
        if not isinstance(shot.prompt, str):
            raise InvalidOptionError(f"the refiner's prompt is one text, got {type(shot.prompt).__name__}")
    return schedule


@torch.no_grad()
def encoded(pipeline: Any, prompt: Any, rows: int) -> Text:
    """Return text embeddings of one prompt, for every row of a batch."""
    transformer = pipeline.transformer
    embeds, mask = pipeline._encode_prompt(prompt, device=pipeline._execution_device, dtype=transformer.dtype)
    return Text(embeds.expand(rows, -1, -1), mask.expand(rows, -1))
