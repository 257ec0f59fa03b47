"""The command `kvpack`: a demo, generation with any model, measures, what is installed, what a length would cost."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli.convert import convert
from kvpack.cli.evaluate import evaluate
from kvpack.cli.plan import plan
from kvpack.cli.support import (
    DTYPES,
    CommandGroup,
    StackName,
    parse_dtype,
    parse_options,
    print_json,
    print_table,
    progress,
    size_text,
)
from kvpack.cli.train import train_compressor
from kvpack.errors import InvalidOptionError

if TYPE_CHECKING:
    pass

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Packed key/value memory for causal video transformers on stock diffusers pipelines.",
)

Seconds = Annotated[float, typer.Option(help="Length of the video.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Options = Annotated[
    list[str],
    typer.Option("--option", "-o", metavar="NAME=VALUE", help="Option of the stack, e.g. topk=8."),
]

TERMINATED = 128 + signal.SIGTERM
TRACK_COLUMNS = ("stack", "fps", "KV attended", "KV archive")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Print the version, or run a command."""
    if version:
        from kvpack.version import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    prompt: Annotated[
        str | None, typer.Option(help="What the video shows.", show_default="a red circle bouncing over dusk rings")
    ] = None,
    seconds: Seconds = 120.0,
    compare: Annotated[
        str, typer.Option(metavar="STACK,STACK,...", help="Stacks, shown side by side if there are several.")
    ] = "packforcing",
    output: Annotated[Path, typer.Option(help="Directory for demo.mp4, demo.png and demo.json.")] = Path("demo-output"),
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a chunk.")] = 6,
    model: Annotated[Path | None, typer.Option(help="Another folder of the shipped pipeline's kind.")] = None,
    as_json: Json = False,
) -> None:
    """Generate a long video with the tiny pipeline that comes with kvpack.

    It was trained on clips of five seconds. Writes the video while it is generated, a contact sheet and the figures.

    Colours: red, green, blue, yellow, magenta, cyan, orange, white. Shapes: circle, square, triangle. Backgrounds:
    night stripes, dark checks, dusk rings, plain slate.
    """
    from kvpack.cli.demo import PROMPT, Demo, run

    stacks = tuple(name.strip() for name in compare.split(",") if name.strip())
    if not stacks:
        raise InvalidOptionError("--compare names no stack; give one or several, e.g. full,self-forcing,packforcing")
    with progress() as on_chunk:
        result = run(Demo(PROMPT if prompt is None else prompt, seconds, stacks, output, seed, steps, model), on_chunk)
    _print_tracks(result, result["stacks"], result["files"], as_json)


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="Folder of a diffusers pipeline.")],
    prompt: Annotated[str, typer.Option(help="What the video shows.")],
    seconds: Seconds,
    output: Annotated[Path, typer.Option(help="The mp4 to write.")],
    stack: StackName = None,
    option: Options = [],  # noqa: B006  # typer reads it, nobody changes it
    height: Annotated[int | None, typer.Option(help="Pixels; the pipeline's own default if not given.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the pipeline's own default if not given.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second.", show_default="the model's own, else 16")] = None,
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
    as_json: Json = False,
) -> None:
    """Generate a video of any length with a model of your own, written while it is generated."""
    import torch

    from kvpack.checkpoints.config import Settings
    from kvpack.media.video import VideoWriter
    from kvpack.pipeline.enable import enable
    from kvpack.pipeline.track import beginning, load_pipeline, started
    from kvpack.planning.planner import video_frames
    from kvpack.plugins.resolve import resolve_stack

    settings = Settings.of_folder(model) or Settings()
    fps = settings.fps if fps is None else fps
    frames, _ = video_frames(seconds, fps)
    resolve_stack(stack, parse_options(option), settings)  # finds out now whether it is one
    named = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "video": None if begin is None else beginning(begin),
    }
    given = {name: value for name, value in named.items() if value is not None}
    arguments = {**settings.call, **given, **parse_options(call)}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = parse_dtype(dtype or ("float32" if device == "cpu" else "bfloat16"))
    writer = VideoWriter(output, fps)  # finds out now whether it can be written
    pipeline = load_pipeline(model, precision, device)
    policy = enable(pipeline, stack, **parse_options(option)).packforcing.stack
    with started(pipeline, policy, frames, seed, arguments) as track, writer, progress() as on_chunk:
        while (chunk := track.next_frames()) is not None:
            writer.write(chunk)
            on_chunk(track)
    result = {"output": str(output), "prompt": prompt, "seed": seed, "fps": fps, **track.report()}
    _print_tracks(result, [result], [str(output)], as_json)


app.command()(convert)
app.command()(evaluate)
app.command()(train_compressor)
app.command()(plan)


@app.command()
def policies(as_json: Json = False) -> None:
    """List what is installed: policies by role, stacks and adapters, their papers and packages, and what failed."""
    from kvpack.cli.tables import installed, left_out

    rows, failures = installed(), left_out()
    if as_json:
        print_json({"policies": rows, "failures": failures})
        return
    columns = ("role", "name", "paper", "package", "version")
    print_table("installed", columns, [[row[column] for column in columns] for row in rows])
    if failures:
        print_table("left out", list(failures[0]), [list(row.values()) for row in failures])


def _print_tracks(result: dict[str, Any], tracks: list[dict[str, Any]], files: list[str], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    rows = []
    for track in tracks:
        held = [size_text(track["stats"][key]) for key in ("attended_bytes", "archive_bytes")]
        rows.append([track["stats"]["stack"], f"{track['frames_per_second']:.1f}", *held])
    print_table(f"{tracks[0]['frames'] / result['fps']:g} s of video", TRACK_COLUMNS, rows)
    typer.echo(f"wrote {', '.join(files)}")


def main() -> None:
    """Run the console script."""

    def stop(*_: object) -> None:
        raise SystemExit(TERMINATED)  # unwinds, so that nothing half-written is left

    signal.signal(signal.SIGTERM, stop)
    app()
