"""A file of prompts on the command line: what is asked for, its share of a process of accelerate, and what was made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvpack.cli.call import call_defaults, check_guidance, given_arguments, require_no_beginning, require_savable
from kvpack.cli.support import default_device, parse_dtype, parse_options, print_json, print_table
from kvpack.errors import KVPackError, first_line, require_seed

if TYPE_CHECKING:
    from kvpack.batch.folder import BatchFolder
    from kvpack.batch.videos import Settings, Video

#: Chunks between two checkpoints, unless told otherwise.
EVERY = 10


@dataclass(frozen=True)
class Asked:
    """What the options of `kvpack batch` and `kvpack generate --prompts` say."""

    prompts: Path
    output: Path
    model: Path
    seconds: float | None
    seed: int
    stack: str | None
    option: Sequence[str]
    named: Mapping[str, Any]
    call: Sequence[str]
    fps: float | None
    dtype: str | None
    every: int | None

    def read(self, device: str) -> "tuple[Settings, list[Video], BatchFolder]":
        """Return settings, videos and folder, once all that can be known without the weights is known to be right.

        Raises:
            InvalidOptionError: if an option or a line of the file is wrong.
        """
        from kvpack.batch.folder import BatchFolder
        from kvpack.batch.videos import Settings, read_videos
        from kvpack.checkpoints.config import require_model_folder
        from kvpack.planning.presets import timing
        from kvpack.plugins.resolve import resolve_stack

        model = require_model_folder(self.model)
        given = given_arguments({"prompt": "", **self.named}, parse_options(self.call))
        del given["prompt"]
        require_savable(given)
        (own, scale), defaults = timing(model), call_defaults(model)
        require_no_beginning(defaults)
        fps = float(own.fps) if self.fps is None else self.fps
        options = parse_options(self.option)
        resolve_stack(self.stack, options, own)
        arguments = {**own.call, **given, **({"fps": fps} if "fps" in defaults else {})}
        dtype = self.dtype or ("float32" if device == "cpu" else "bfloat16")
        parse_dtype(dtype)
        every = self.every or EVERY
        settings = Settings(str(model.resolve()), self.stack, fps, scale, every, dtype, device, options, arguments)

        def check(video: "Video") -> None:
            settings.frames(video)
            check_guidance(
                {**arguments, "negative_prompt": video.negative_prompt or given.get("negative_prompt")}, defaults
            )

        videos = read_videos(self.prompts, require_seed(self.seed), self.seconds, check)
        return settings, videos, BatchFolder(self.output)


def make_own_share(asked: Asked, device: str | None, as_json: bool) -> None:
    """Make the videos that fall to this process of `accelerate launch`; all of them where it is alone."""
    from accelerate import PartialState

    from kvpack.batch.work import Work

    device = device or default_device()
    settings, videos, folder = asked.read(device)
    state: Any = PartialState(cpu=device == "cpu")
    with state.main_process_first():
        folder.ask(settings, videos)
    made = folder.made()
    rest = [video for video in videos if video.name not in made]
    state.wait_for_everyone()  # all have read the manifest before one of them writes into it
    share = rest[state.process_index :: state.num_processes]
    work = Work(settings, folder) if share else None
    for video in share:
        folder.note({**_made(work, video), "begun": 1})
    others = {video.name for video in rest} - {video.name for video in share}
    print_made(folder, [video for video in videos if video.name not in others], as_json)


def _made(work: Any, video: "Video") -> dict[str, Any]:
    try:
        *_, frames = work.make(video)
    except Exception as error:  # a bug, or want of memory, in one video keeps no other from being made
        told = str(error) if isinstance(error, KVPackError) else f"{type(error).__name__}: {first_line(error)}"
        return {"name": video.name, "error": told}
    typer.echo(f"wrote {work.folder.output(video)}", err=True)
    return work.entry(video, frames)


def print_made(folder: "BatchFolder", videos: "Sequence[Video]", as_json: bool) -> None:
    """Print which of some videos were made, as JSON or as a table, and end with 1 where some were not."""
    made = folder.made()
    failed = {entry["name"]: entry["error"] for entry in folder.entries() if "error" in entry}
    lines = [made.get(video.name) or {"name": video.name, "error": failed.get(video.name, "")} for video in videos]
    wrong = [line for line in lines if "error" in line]
    if as_json:
        print_json({"output": str(folder.path), "videos": lines, "failed": len(wrong)})
    else:
        columns = ("video", "seed", "seconds", "begun", "sha256")
        print_table(
            f"{len(lines) - len(wrong)} of {len(lines)} videos in {folder.path}", columns, list(map(_row, lines))
        )
    for line in wrong:
        typer.echo(f"error: {line['name']}: {line['error']}", err=True)
    if wrong:
        raise typer.Exit(1)


def _row(line: Mapping[str, Any]) -> list[str]:
    if "error" in line:
        return [line["name"], "", "", "", "not made"]
    seconds = f"{line['frames'] / line['fps']:g}"
    return [line["name"], str(line["seed"]), seconds, str(line["begun"]), line["sha256"][:16]]
