"""`kvpack generate`: a video of any length with a model of one's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack.cli import options
from kvpack.cli.call import (
    call_defaults,
    call_options,
    check_guidance,
    given_arguments,
    require_no_beginning,
    require_savable,
)
from kvpack.cli.futures import futures_of, written_futures
from kvpack.cli.resume import checkpoint_folder
from kvpack.cli.support import (
    default_device,
    parse_dtype,
    parse_options,
    parse_prompt,
    print_tracks,
    progress,
    refuse_beside,
)
from kvpack.errors import InvalidOptionError, require_seed


def generate(
    model: options.Model,
    seconds: options.Seconds,
    output: Annotated[Path, typer.Option(help="The mp4 to write; the folder of all, with --prompts.")],
    prompt: Annotated[
        str | None,
        typer.Option(help="""What the video shows, or a schedule '[(0, "a"), (20, "b"), (40, "c", "cut")]'."""),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts, as 'kvpack batch' takes it, over processes of 'accelerate launch'; with --fork-at "
            """a line for each future: a prompt, or '{"prompt": "a", "seed": 7}'."""
        ),
    ] = None,
    stack: options.StackName = None,
    option: options.Options = [],  # noqa: B006  # typer reads it, nobody changes it
    budget_gb: Annotated[
        float | None, typer.Option(metavar="GB", help="Choose options so that the memory holds at most this, e.g. 4.")
    ] = None,
    height: options.Height = None,
    width: options.Width = None,
    fps: options.Fps = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    negative_prompt: options.NegativePrompt = None,
    begin: Annotated[Path | None, typer.Option(help="Image or clip that the video begins with.")] = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    call: options.Call = [],  # noqa: B006
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
    trace: Annotated[
        Path | None, typer.Option(help="File for what the memory does, chunk by chunk; see kvpack report.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Generate a video of any length with a model of your own, written while it is generated.

    Ctrl-C and SIGTERM end it with the frames that are there; with --checkpoint-every 'kvpack resume' goes on after them
    and after anything else.
    """
    from kvpack.checkpoints.config import require_model_folder
    from kvpack.media.files import require_writable
    from kvpack.media.reading import is_picture
    from kvpack.media.video import VideoWriter

    named = call_options(height, width, steps, guidance_scale, negative_prompt)
    if prompts is not None and fork_at is None:
        from kvpack.cli.prompts import Asked, make_own_share

        of_one = {"--prompt": prompt, "--begin": begin, "--checkpoint": checkpoint, "--trace": trace}
        refuse_beside("--prompts", {**of_one, "--budget-gb": budget_gb})
        asked = Asked(prompts, output, model, seconds, seed, stack, option, named, call, fps, dtype, checkpoint_every)
        make_own_share(asked, device, as_json)
        return
    if prompt is None:
        raise InvalidOptionError("say what the video shows: --prompt TEXT for one video, --prompts FILE for many")
    # What is wrong is told before torch is imported, and all but the weights before they are loaded.
    model = require_model_folder(model)
    VideoWriter(output, 1)
    if trace is not None and not (trace.is_symlink() or trace.is_fifo() or trace.is_char_device()):
        require_writable(trace)  # a link, a pipe or a device is written where it leads, not beside it
    if trace is not None and trace.resolve() == output.resolve():
        raise InvalidOptionError(f"--trace and --output are one file, {output}; give the trace another name")
    require_seed(seed)
    folder = checkpoint_folder(output, checkpoint_every, checkpoint)
    others = {"--checkpoint-every": checkpoint_every, "--trace": trace}
    futures = futures_of(fork_at, prompts, seconds, output, others)
    picture = begin is not None and is_picture(begin)
    given = given_arguments({"prompt": parse_prompt(prompt), **named}, parse_options(call))
    if folder is not None or fork_at is not None:
        require_savable(given)

    from kvpack.pipeline.checkpoints import Job, checkpointed
    from kvpack.pipeline.enable import enable
    from kvpack.pipeline.track import load_pipeline, started
    from kvpack.planning.budget import Budget
    from kvpack.planning.planner import video_frames
    from kvpack.planning.presets import timing
    from kvpack.plugins.resolve import resolve_stack

    (settings, scale), defaults = timing(model), call_defaults(model)
    fps = float(settings.fps) if fps is None else fps
    frames, _ = video_frames(seconds, fps, scale)
    writer = VideoWriter(output, fps)
    resolve_stack(stack, parse_options(option), settings)  # finds out now whether it is one
    if budget_gb is not None:
        Budget(budget_gb)  # and whether it is a number
    arguments = {**settings.call, **given, **({"fps": fps} if "fps" in defaults else {})}
    check_guidance(arguments, defaults)
    if begin is None:
        require_no_beginning(defaults)
    name = None if begin is None else _check_beginning(begin, picture, arguments, defaults, fps, frames)
    device = device or default_device()
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    precision = parse_dtype(dtype)
    pipeline = load_pipeline(model, precision, device)
    enable(pipeline, stack, budget_gb=budget_gb, **parse_options(option))
    pipeline.packforcing.fps = fps
    pipeline.packforcing.trace(trace)
    if begin is not None and name is not None:
        arguments[name] = _beginning(begin, picture, name, {**defaults, **arguments}, fps, pipeline)
    said = {"prompt": prompt, "seed": seed, "fps": fps}
    with started(pipeline, None, frames, seed, arguments) as track, progress() as on_chunk:
        if track.choice is not None:
            typer.echo(str(track.choice), err=True)
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
    if picture and frames == 1:
        raise InvalidOptionError(
            f"--begin {begin} is one frame and the whole video too, so that nothing is left to generate; give more "
            "--seconds"
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
