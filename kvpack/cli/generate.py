"""`kvpack generate`: a video of any length with a model of one's own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack.cli.futures import futures_of, written_futures
from kvpack.cli.resume import checkpoint_folder
from kvpack.cli.support import (
    DTYPES,
    Json,
    Options,
    Seconds,
    Seed,
    StackName,
    default_device,
    parse_dtype,
    parse_options,
    parse_prompt,
    print_tracks,
    progress,
    require_seed,
)
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


def generate(
    model: Annotated[Path, typer.Option(help="Folder of a diffusers pipeline, or its Hub id.")],
    prompt: Annotated[
        str, typer.Option(help="""What the video shows, or a schedule '[(0, "a"), (20, "b"), (40, "c", "cut")]'.""")
    ],
    seconds: Seconds,
    output: Annotated[Path, typer.Option(help="The mp4 to write.")],
    stack: StackName = None,
    option: Options = [],  # noqa: B006  # typer reads it, nobody changes it
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own, else the pipeline's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own, else the pipeline's.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second.", show_default="the model's own")] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Denoising steps of a chunk.", show_default="the model's own, else the pipeline's"),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 is no guidance.", show_default="the model's own, else the pipeline's")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it does not show; needs guidance.")] = None,
    begin: Annotated[Path | None, typer.Option(help="Image or clip that the video begins with.")] = None,
    seed: Seed = 0,
    dtype: Annotated[
        str | None, typer.Option(help=", ".join(DTYPES), show_default="float32 on cpu, else bfloat16")
    ] = None,
    device: Annotated[str | None, typer.Option(help="E.g. cpu or cuda.", show_default="cuda if there is one")] = None,
    call: Annotated[
        list[str], typer.Option(metavar="NAME=VALUE", help="Further argument of the pipeline's call.")
    ] = [],  # noqa: B006
    checkpoint_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="CHUNKS", help="Save it every so many chunks, see 'kvpack resume'."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder to save it in.", show_default="OUTPUT.checkpoint")
    ] = None,
    fork_at: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Write several videos that part here; needs --prompts.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='File with a line for each of them: a prompt, or {"prompt": .., "seed": ..}.')
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="File for what the memory does, chunk by chunk; see kvpack report.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate a video of any length with a model of your own, written while it is generated.

    Ctrl-C and SIGTERM end it with the frames that are there; with --checkpoint-every 'kvpack resume' goes on after them
    and after anything else.
    """
    from kvpack.checkpoints.config import require_model_folder
    from kvpack.media.reading import is_picture
    from kvpack.media.video import VideoWriter

    # What is wrong is told before torch is imported, and all but the weights before they are loaded.
    model = require_model_folder(model)
    VideoWriter(output, 1)
    require_seed(seed)
    folder = checkpoint_folder(output, checkpoint_every, checkpoint)
    others = {"--checkpoint-every": checkpoint_every, "--trace": trace}
    futures = futures_of(fork_at, prompts, seconds, output, [name for name, value in others.items() if value])
    picture = begin is not None and is_picture(begin)
    named = {
        "prompt": parse_prompt(prompt),
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
    }
    given = _given({name: value for name, value in named.items() if value is not None}, parse_options(call))

    from kvpack.pipeline.checkpoints import Job, checkpointed
    from kvpack.pipeline.enable import enable
    from kvpack.pipeline.track import load_pipeline, started
    from kvpack.planning.planner import video_frames
    from kvpack.planning.presets import timing
    from kvpack.plugins.resolve import resolve_stack

    (settings, scale), defaults = timing(model), _defaults(model)
    fps = float(settings.fps) if fps is None else fps
    writer = VideoWriter(output, fps)
    frames, _ = video_frames(seconds, fps, scale)
    resolve_stack(stack, parse_options(option), settings)  # finds out now whether it is one
    arguments = {**settings.call, **given, **({"fps": fps} if "fps" in defaults else {})}
    _check_guidance(arguments, defaults)
    name = None if begin is None else _check_beginning(begin, picture, arguments, defaults, fps, frames)
    device = device or default_device()
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    precision = parse_dtype(dtype)
    pipeline = load_pipeline(model, precision, device)
    policy = enable(pipeline, stack, **parse_options(option)).packforcing.stack
    pipeline.packforcing.fps = fps
    pipeline.packforcing.trace(trace)
    if begin is not None and name is not None:
        arguments[name] = _beginning(begin, picture, name, {**defaults, **arguments}, fps, pipeline)
    said = {"prompt": prompt, "seed": seed, "fps": fps}
    with started(pipeline, policy, frames, seed, arguments) as track, progress() as on_chunk:
        if fork_at is not None and futures:
            reports = written_futures(track, futures, fork_at, fps, on_chunk)
            result = {**said, "fork_at": fork_at, "shared_frames": track.frames, "futures": reports}
            print_tracks(result, reports, list(map(str, futures)), as_json)
            return
        if folder is not None and checkpoint_every is not None:
            job = Job(str(model.resolve()), str(output.resolve()), prompt, seed, fps, checkpoint_every, dtype, device)
            job.write(folder)
            checkpointed(track, job, folder, on_chunk)
        else:
            with writer:
                while (chunk := track.next_frames()) is not None:
                    writer.write(chunk)
                    on_chunk(track)
    result = {"output": str(output), **said, **track.report()}
    print_tracks(result, [result], [str(output)], as_json)


def _given(named: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for name in more:
        if name in RESERVED:
            raise InvalidOptionError(f"--call {name} cannot be given here, for {RESERVED[name]}; leave it out")
        if name in named:
            raise InvalidOptionError(f"{name} was given twice, by its own option and by --call; leave one out")
    return {**named, **more}


def _defaults(model: Path) -> dict[str, Any]:
    """Return the arguments that the model's pipeline takes with kvpack, and their defaults; none if it isn't known."""
    import inspect

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
    own = {each.name: each.default for each in inspect.signature(found.__call__).parameters.values()}
    return {**own, **(adapter.extra_arguments if adapter else {})}


def _check_guidance(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    scale = arguments.get("guidance_scale", defaults.get("guidance_scale"))
    if arguments.get("negative_prompt") and isinstance(scale, int | float) and scale <= 1:
        raise InvalidOptionError(
            f"a negative prompt needs guidance, but guidance_scale is {scale:g}; give --guidance-scale, e.g. 5, "
            "or leave --negative-prompt out"
        )


def _check_beginning(
    begin: Path, picture: bool, arguments: Mapping[str, Any], defaults: Mapping[str, Any], fps: float, frames: int
) -> str | None:
    """Return the argument of the pipeline's call that takes the picture or clip."""
    from kvpack.media.reading import count_frames

    wanted = ("image", "video") if picture else ("video",)
    name = next((each for each in wanted if each in defaults), None)
    if name is None and defaults:
        takes = "a picture" if "image" in defaults else "neither a picture nor a clip"
        raise InvalidOptionError(
            f"this pipeline begins with {takes}, but --begin {begin} is a {'picture' if picture else 'clip'}"
        )
    if not picture:
        count = count_frames(begin, fps)
        count = min(count, arguments.get("overlap_history") or count)
        if count >= frames:
            raise InvalidOptionError(
                f"--begin {begin} lasts {count / fps:.3g} s ({count} frames at {fps:g} a second) and the whole video "
                f"{frames / fps:.3g} s ({frames} frames), so that nothing is left to generate; give more --seconds or "
                "a shorter clip"
            )
    return name


def _beginning(begin: Path, picture: bool, name: str, call: Mapping[str, Any], fps: float, pipeline: Any) -> Any:
    """Return the pixels of a picture, or of a clip's last frames, as many as the VAE takes."""
    from kvpack.media.pixels import image_pixels, video_pixels
    from kvpack.media.reading import count_frames

    if picture:
        pixels = image_pixels(begin, call.get("height"), call.get("width"))
        return pixels if name == "image" else pixels[None]
    scale = pipeline.vae_scale_factor_temporal
    last = (count_frames(begin, fps) - 1) // scale * scale + 1
    return video_pixels(begin, call.get("height"), call.get("width"), fps, last=last)
