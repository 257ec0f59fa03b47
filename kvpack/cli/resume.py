"""`kvpack resume`: go on with a video whose process has ended."""

from pathlib import Path
from typing import Annotated

import typer

from kvpack.cli import options
from kvpack.cli.support import parse_dtype, print_tracks, progress
from kvpack.errors import InvalidOptionError


def resume(
    folder: Annotated[
        Path, typer.Argument(help="Checkpoint folder: OUTPUT.checkpoint, unless --checkpoint named another.")
    ],
    device: Annotated[
        str | None, typer.Option(help="E.g. cpu or cuda; another one gives other bits.", show_default="as before")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Go on with a video from its last checkpoint, as if its process had never ended."""
    from kvpack.pipeline.checkpoints import Job, checkpointed, reopened

    job = Job.read(folder)
    with reopened(folder, job, parse_dtype(job.dtype), device or job.device) as track, progress() as on_chunk:
        frames = checkpointed(track, job, folder, on_chunk)
    said = {"output": job.output, "prompt": job.prompt, "seed": job.seed, "fps": job.fps}
    result = {**said, **track.report(), "resumed_frames": track.frames, "frames": frames}
    print_tracks(result, [result], [job.output], as_json)


def checkpoint_folder(output: Path, every: int | None, given: Path | None) -> Path | None:
    """Return the folder that checkpoints go into; None if there are none.

    Raises:
        InvalidOptionError: if a folder is given, but not how often it is written.
        OutputError: if it holds another generation.
    """
    if every is None:
        if given is not None:
            raise InvalidOptionError("--checkpoint has no effect without --checkpoint-every; give it, e.g. 30")
        return None
    from kvpack.pipeline.checkpoints import require_free

    folder = given or output.with_name(f"{output.name}.checkpoint")
    require_free(folder)
    return folder
