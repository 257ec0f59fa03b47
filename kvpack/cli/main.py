"""The command `kvpack`: all commands, each of which imports what it needs when it runs."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from kvpack.cli import options
from kvpack.cli.batch import batch
from kvpack.cli.convert import convert
from kvpack.cli.env import env
from kvpack.cli.evaluate import evaluate
from kvpack.cli.generate import generate
from kvpack.cli.plan import plan
from kvpack.cli.report import report
from kvpack.cli.resume import resume
from kvpack.cli.support import CommandGroup, Terminated, parse_compared, print_json, print_table, print_tracks, progress
from kvpack.cli.train import train_compressor
from kvpack.cli.ui.command import ui
from kvpack.errors import InvalidOptionError, require_seed

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Packed key/value memory for causal video transformers on stock diffusers pipelines.",
)


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
    seconds: options.Seconds = 120.0,
    compare: Annotated[
        str,
        typer.Option(
            metavar="STACK[:NAME=VALUE,...],...",
            help="Stacks, side by side if there are several, e.g. packforcing:topk=4,self-forcing.",
        ),
    ] = "full,self-forcing,packforcing",
    output: Annotated[Path, typer.Option(help="Directory for demo.mp4, .png, .html and .json.")] = Path("demo-output"),
    seed: options.Seed = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a chunk.")] = 6,
    model: Annotated[Path | None, typer.Option(help="Another folder of the shipped pipeline's kind.")] = None,
    seeds: Annotated[
        int, typer.Option(min=0, help="Make videos of so many seeds besides, and show their ends; 0 shows kept ones.")
    ] = 0,
    as_json: options.Json = False,
) -> None:
    """Generate a long video with the tiny pipeline that comes with kvpack.

    It was trained on clips of five seconds. Writes the video while it is generated, a picture that explains itself, a
    page around both, and the figures. Three memories and two minutes take about two minutes; --seeds 8 some ten more.

    Colours: red, green, blue, yellow, magenta, cyan, orange, white. Shapes: circle, square, triangle. Backgrounds:
    night stripes, dark checks, dusk rings, plain slate.
    """
    from kvpack.media.files import make_folder

    require_seed(seed)
    stacks = parse_compared(compare)
    if not stacks:
        raise InvalidOptionError("--compare names no stack; give one or several, e.g. full,self-forcing,packforcing")
    make_folder(output)  # before what takes seconds to import

    from kvpack.cli.demo import PROMPT, Demo, run

    asked = Demo(PROMPT if prompt is None else prompt, seconds, stacks, output, seed, steps, model, seeds)
    with progress() as on_chunk:
        result = run(asked, on_chunk)
    print_tracks(result, result["stacks"], result["files"], as_json)


for _command in (generate, resume, batch, convert, evaluate, train_compressor, plan, env, report, ui):
    app.command()(_command)


@app.command()
def policies(
    name: Annotated[str | None, typer.Argument(help="Policy or stack whose options are listed.")] = None,
    as_json: options.Json = False,
) -> None:
    """List what is installed: policies by role, stacks and adapters, their papers and packages, and what failed.

    With a name, list its options, their defaults and meanings.
    """
    from kvpack.cli.tables import described, installed, left_out

    if name is not None:
        found = described(name)
        if as_json:
            print_json({"policies": found})
            return
        for each in found:
            rows = [[row["option"], row["default"], row["meaning"]] for row in each["options"]]
            print_table(f"{each['role']} {name}: {each['summary']}", ("option", "default", "meaning"), rows)
        return
    policies, failures = installed(), left_out()
    if as_json:
        print_json({"policies": policies, "failures": failures})
        return
    columns = ("role", "name", "paper", "package", "version")
    print_table("installed", columns, [[row[column] for column in columns] for row in policies])
    if failures:
        print_table("left out", list(failures[0]), [list(row.values()) for row in failures])


def main() -> None:
    """Run the console script."""

    def stop(*_: object) -> None:
        raise Terminated  # unwinds, so that what is being written is completed or removed

    signal.signal(signal.SIGTERM, stop)
    app()
