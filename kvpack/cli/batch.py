"""`kvpack batch`: the videos of a file of prompts, over workers of Ray."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli import options
from kvpack.cli.call import call_options
from kvpack.cli.support import default_device
from kvpack.errors import InvalidOptionError

if TYPE_CHECKING:
    from kvpack.batch.pool import Event, OnEvent


def batch(
    prompts: Annotated[Path, typer.Argument(help="""File of lines such as {"prompt": "a fox", "seed": 3}.""")],
    model: options.Model,
    output: Annotated[Path, typer.Option(help="Folder for the videos and their manifest.jsonl.")],
    seconds: Annotated[float | None, typer.Option(help="Length of the videos whose line gives none.")] = None,
    stack: options.StackName = None,
    option: options.Options = [],  # noqa: B006  # typer reads it, nobody changes it
    height: options.Height = None,
    width: options.Width = None,
    fps: options.Fps = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    negative_prompt: options.NegativePrompt = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    call: options.Call = [],  # noqa: B006
    checkpoint_every: Annotated[
        int, typer.Option(min=1, metavar="CHUNKS", help="A worker that is lost costs at most so many.")
    ] = 10,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes, each with a pipeline.", show_default="one a GPU, else one")
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Times that a video is tried again from one and the same checkpoint.")
    ] = 3,
    address: Annotated[
        str | None, typer.Option(help="Of a cluster of Ray, e.g. auto.", show_default="this machine")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Generate a video for each line of a file, over several workers, each of which may be lost at any time.

    The same command again goes on where the last one ended. Keys of a line: prompt (or a schedule), name, seed,
    seconds, negative_prompt.
    """
    from kvpack.cli.prompts import Asked, print_made

    named = call_options(height, width, steps, guidance_scale, negative_prompt)
    asked = Asked(prompts, output, model, seconds, seed, stack, option, named, call, fps, dtype, checkpoint_every)
    settings, videos, folder = asked.read(device or ("cuda" if address else default_device()))

    from kvpack.batch.cluster import cluster, require_ray
    from kvpack.batch.pool import Pool

    made = folder.made()
    rest = [video for video in videos if video.name not in made]
    if rest:
        require_ray()  # before the folder says that it is this batch's
    folder.ask(settings, videos)
    if rest:
        with progress(len(videos), len(made)) as on_event, cluster(address, workers) as ray:
            gpus = int(ray.cluster_resources().get("GPU", 0))
            if settings.device.startswith("cuda") and not gpus:
                raise InvalidOptionError("Ray sees no GPU; give --device cpu")  # its workers would wait for one
            Pool(ray, settings, folder, rest, workers or gpus or 1, retries, on_event).run()
    print_made(folder, videos, as_json)


@contextmanager
def progress(videos: int, made: int) -> "Iterator[OnEvent]":
    """Show a bar of the videos on standard error, and what each worker is at."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("videos"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    display = Progress(*columns, console=Console(file=sys.stderr))
    task = display.add_task("", total=videos, completed=made, note="workers start")
    at: dict[int, str] = {}

    def advance(event: "Event") -> None:
        at.pop(event.process, None)
        if event.kind == "frames":
            at[event.process] = f"{event.video.name}: {event.frames} frames"
        elif event.kind == "lost":
            display.print(f"{event.video.name} is gone on with, since its worker was lost: {event.said}")
        elif event.kind == "failed":
            display.print(f"{event.video.name} failed: {event.said}")
        display.start()  # not earlier: what fails before prints its one line and nothing else
        done: Any = display.tasks[0].completed + (event.kind in ("made", "failed"))
        display.update(task, completed=done, note=", ".join(at.values()))

    try:
        yield advance
    finally:
        display.stop()
