"""Arguments of a SkyReels-V2 diffusion-forcing pipeline's call, checked before anything is computed."""

from typing import Any

from kvpack.adapters.wan.call import checked
from kvpack.errors import InvalidOptionError, require_int


def checked_call(pipeline: Any, arguments: dict[str, Any], *, streaming: bool) -> dict[str, Any]:
    """Return all arguments of the pipeline's call.

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
    """Refuse a last image that would have a chunk of its own: in a causal model nothing would see it.

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
