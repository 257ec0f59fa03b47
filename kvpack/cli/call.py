"""The arguments that the options of a command make of a pipeline's call."""

import json
from collections.abc import Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from kvpack.errors import InvalidOptionError

#: Arguments of a pipeline's call that the command gives itself.
RESERVED = {
    "num_frames": "--seconds says how long the video is",
    "generator": "--seed says what noise is drawn",
    "output_type": "frames are written to --output",
    "return_dict": "frames are written to --output",
    "num_videos_per_prompt": "one video is written",
    "image": "--begin says what the video begins with",
    "video": "--begin says what the video begins with",
}


def call_options(
    height: int | None, width: int | None, steps: int | None, guidance_scale: float | None, negative_prompt: str | None
) -> dict[str, Any]:
    """Return the options of a call by the names that pipelines have for them."""
    return {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }


def given_arguments(named: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that options and --call give; None is not given.

    Raises:
        InvalidOptionError: if one is given twice, or is the command's own.
    """
    named = {name: value for name, value in named.items() if value is not None}
    for name in more:
        if name in RESERVED:
            raise InvalidOptionError(f"--call {name} cannot be given here, for {RESERVED[name]}; leave it out")
        if name in named:
            raise InvalidOptionError(f"{name} was given twice, by its own option and by --call; leave one out")
    return {**named, **more}


def call_defaults(model: Path) -> dict[str, Any]:
    """Return the arguments that the model's pipeline takes with kvpack, and their defaults; none if it isn't known."""
    import diffusers

    from kvpack.plugins.registry import registry

    try:
        name = json.loads((model / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    found: Any = getattr(diffusers, str(name), None)
    if not isinstance(found, type):
        return {}
    adapter = registry().adapter(found)
    own = {each.name: each.default for each in signature(found.__call__).parameters.values()}
    return {**own, **(adapter.extra_arguments if adapter else {})}


def require_savable(given: Mapping[str, Any]) -> None:
    """Raise `InvalidOptionError` if an argument does not go with a generation that is saved or forked."""
    if given.get("decode_device") is not None:
        raise InvalidOptionError(
            "--call decode_device does not go with checkpoints, prompts of a file or --fork-at, since it is a chunk "
            "ahead of the frames that are handed out; leave it out"
        )


def require_no_beginning(defaults: Mapping[str, Any]) -> None:
    """Raise `InvalidOptionError` if a pipeline needs a picture or clip that its videos begin with."""
    for name, kind in (("image", "picture"), ("video", "clip")):
        if defaults.get(name) is Parameter.empty:
            raise InvalidOptionError(f"this pipeline begins with a {kind}; give 'kvpack generate' one by --begin FILE")


def check_guidance(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise `InvalidOptionError` if a negative prompt is given, but no guidance."""
    scale = arguments.get("guidance_scale", defaults.get("guidance_scale"))
    if arguments.get("negative_prompt") and isinstance(scale, int | float) and scale <= 1:
        raise InvalidOptionError(
            f"a negative prompt needs guidance, but guidance_scale is {scale:g}; give --guidance-scale, e.g. 5, "
            "or leave --negative-prompt out"
        )
