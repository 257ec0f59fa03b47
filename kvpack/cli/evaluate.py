"""The command `kvpack evaluate`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack.cli import options
from kvpack.cli.support import default_device, print_json, print_table
from kvpack.errors import InvalidOptionError


def evaluate(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="Video files of any kind.")],
    as_json: options.Json = False,
    vbench: Annotated[bool, typer.Option("--vbench", help="Run VBench instead, where it is installed.")] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with the prompt of each video, one a line; for --vbench.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for the videos under VBench's names; for --vbench.")
    ] = None,
) -> None:
    """Measure videos by plain vision: is the subject itself, the background steady, does it move, what comes back.

    All measures are better the higher; all lie in 0..1 but motion_speed, which is in frame heights a second. drift is
    the last five seconds minus the first five. What can't be said of a video is left empty. Those of docs/results.md
    have other names: they are measured with facts of the world that is filmed, which a file doesn't have.
    """
    if vbench:
        _vbench(videos, prompts, output, as_json)
        return
    for name, given in (("--prompts", prompts), ("--output", output)):
        if given is not None:
            raise InvalidOptionError(f"{name} goes with --vbench, got it without; add --vbench or leave {name} out")
    rows = [measured(video) for video in videos]
    if as_json:
        print_json({"videos": [_plain(row) for row in rows]})
        return
    for row in rows:
        lines = [[name, _text(value), _text(row["drift"][name])] for name, value in row["measures"].items()]
        title = f"{row['video']}, {row['frames']:,} frames at {row['fps']:g} fps"
        print_table(title, ("measure", "value", "drift"), lines)
        print(f"not measured, for they need facts of the world that is filmed: {', '.join(row['unmeasured'])}")


def measured(video: Path) -> dict[str, Any]:
    """Measure one video file, and its drift.

    Raises:
        InvalidOptionError: if it isn't a video.
    """
    from kvpack.evaluation import METRICS, Facts, Observer, general_measures
    from kvpack.media.reading import opened

    with opened(video) as file:
        observer = Observer(Facts(fps=file.fps))
        for frames in file.frames:
            observer.add(frames)
        fps = file.fps
    observation = observer.finish()
    values, drift = general_measures(observation)
    return {
        "video": str(video),
        "fps": fps,
        "frames": observation.frames,
        "measures": values,
        "drift": drift,
        "unmeasured": list(METRICS),
    }


def _vbench(videos: Sequence[Path], prompts: Path | None, output: Path | None, as_json: bool) -> None:
    from kvpack.evaluation import vbench

    if prompts is None or output is None:
        lacking = " and ".join(n for n, given in (("--prompts", prompts), ("--output", output)) if given is None)
        raise InvalidOptionError(f"--vbench needs the prompts and a directory, got no {lacking}")
    vbench.require_installed()
    made = vbench.lay_out(videos, vbench.read_prompts(prompts), output)

    found = vbench.run(output, default_device())
    if as_json:
        print_json({"videos": [str(path) for path in made], "vbench": _plain(found)})
    else:
        print_table(f"VBench, {len(made)} videos", ("dimension", "value"), [[n, _text(v)] for n, v in found.items()])


def _plain(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
