"""What a SkyReels-V2 diffusion-forcing pipeline is asked for, checked before anything is computed."""

from dataclasses import replace
from typing import Any

from kvpack.adapters.wan.call import checked
from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory.base import Memory


def in_blocks(pipeline: Any, stack: Any, call: dict[str, Any]) -> Memory:
    """The stack with chunks as long as the call's, or else the checkpoint's, causal blocks.

    Raises:
        InvalidOptionError: if the stack cannot have chunks of this length.
    """
    given, trained = call["causal_block_size"], pipeline.transformer.config.num_frame_per_block
    if given is not None:
        frames = require_int("causal_block_size", given, minimum=1)
    else:
        frames = trained if trained > 1 else stack.chunk_frames
    if frames == stack.chunk_frames:
        return stack
    try:
        return replace(stack, chunk_frames=frames)
    except (TypeError, InvalidOptionError) as error:
        raise InvalidOptionError(
            f"causal_block_size {frames} does not go with the chunks of {stack.chunk_frames} frames of the stack "
            f"{stack.name} ({error}); pass causal_block_size={stack.chunk_frames}, or enable a stack with "
            f"chunk_frames={frames}"
        ) from error


def checked_call(pipeline: Any, arguments: dict[str, Any], *, streaming: bool) -> dict[str, Any]:
    """All arguments of the pipeline's call.

    Raises:
        InvalidOptionError: if an argument cannot work.
        ValueError: if the pipeline's own check says so.
    """
    # Upstream wants overlap_history beyond base_num_frames; there is no such length here.
    call = checked(pipeline, {**arguments, "base_num_frames": 1}, streaming=streaming)
    _check_schedule(call)
    if call["overlap_history"] is not None:
        require_int("overlap_history", call["overlap_history"], minimum=1)
    if not call["fps"] > 0:
        raise InvalidOptionError(f"fps must be > 0, got {call['fps']}")
    if call.get("last_image") is not None and call["num_frames"] is None:
        raise InvalidOptionError("last_image is where a video ends, and num_frames None is endless; give num_frames")
    if call.get("image_embeds") is not None:
        raise InvalidOptionError("image_embeds are not used by this pipeline; pass image instead")
    if "video" in call and call["video"] is None:
        raise InvalidOptionError("video is None; give the clip that the video goes on from")
    return call


def _check_schedule(call: dict[str, Any]) -> None:
    steps, ar_step = call["num_inference_steps"], require_int("ar_step", call["ar_step"])
    if 0 < ar_step < steps:
        raise InvalidOptionError(
            f"ar_step {ar_step} denoises several blocks at once, but kvpack denoises a block when the one before it is "
            f"clean; pass ar_step=0, or ar_step={steps} which upstream does the same with"
        )
    if call["addnoise_condition"] != 0:
        raise InvalidOptionError(
            f"addnoise_condition {call['addnoise_condition']} adds noise to the history, but kvpack keeps the history "
            "of clean frames; pass addnoise_condition=0"
        )


def check_end(frames: int, chunk_frames: int, scale: int) -> None:
    """Refuses a last image that would have a chunk of its own: in a causal model nothing would see it.

    Args:
        frames: latent frames behind the image that the video begins with.
        chunk_frames: latent frames of a chunk.
        scale: pixel frames of a latent frame.

    Raises:
        InvalidOptionError: if the chunks before it leave it alone.
    """
    if not frames or frames % chunk_frames:
        return
    if chunk_frames == 1:
        advice = "pass a causal_block_size of 2 or more"
    else:
        fewer, more = (1 + scale * (frames + each) for each in (-1, 1))
        advice = f"pass num_frames={fewer} or {more}, or another causal_block_size"
    raise InvalidOptionError(
        f"last_image would be alone in the last chunk, behind {frames} latent frames in chunks of {chunk_frames}, "
        f"and no frame would go towards it; {advice}"
    )
