"""What all commands share: reading their options, progress, tables, and errors of one line."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from kvpack.errors import InvalidOptionError, KVPackError, unknown_name

if TYPE_CHECKING:
    import torch

    from kvpack.pipeline.track import Track

DTYPES = ("bfloat16", "float16", "float32")
INTERRUPTED = 130

StackName = Annotated[
    str | None,
    typer.Option(
        "--stack",
        help="Memory; see 'kvpack policies' for what is installed.",
        show_default="the model's own in its kvpack_config.json, else packforcing",
    ),
]


class CommandGroup(TyperGroup):
    """Commands whose errors are one line; only a bug leaves a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail("interrupted; nothing half-written was left", INTERRUPTED)
        except BrokenPipeError:
            raise
        except (KVPackError, OSError) as error:
            _fail("; ".join([str(error), *getattr(error, "__notes__", [])]))  # a note names the policy that raised
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "memory" in str(error):
                _fail(f"out of memory: {error}; try a smaller size, a smaller dtype or a stack that keeps less")
            raise


def _fail(message: str, code: int = 1) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


def parse_size(text: str) -> tuple[int, int]:
    """Parse text such as 832x480 into width and height.

    Raises:
        InvalidOptionError: if it does not read so.

    >>> parse_size("832x480")
    (832, 480)
    """
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text.strip().lower())
    if match is None:
        raise InvalidOptionError(f"size must be WIDTHxHEIGHT in pixels, e.g. 832x480, got {text!r}")
    return int(match[1]), int(match[2])


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse texts such as topk=8 into options; a value that is not JSON is text.

    Raises:
        InvalidOptionError: if one does not read so, or comes twice.

    >>> parse_options(["topk=8", "compressor=pool", "archive_blocks=none"])
    {'topk': 8, 'compressor': 'pool', 'archive_blocks': None}
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise InvalidOptionError(f"an option must be NAME=VALUE, e.g. topk=8, got {pair!r}")
        if name in options:
            raise InvalidOptionError(f"option {name} was given twice")
        options[name] = _value(value.strip())
    return options


def parse_dtype(name: str) -> "torch.dtype":
    """Return a dtype by name.

    Raises:
        UnknownNameError: if it is none of those that models run in.
    """
    import torch

    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def size_text(count: float) -> str:
    """Format a count of bytes.

    >>> size_text(3987210240)
    '3.99 GB'
    """
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        del units[0]
    return f"{count:.3g} {units[0]}"


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output."""
    typer.echo(json.dumps(data, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(*(Column(each, overflow="fold") for each in columns), title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


@contextmanager
def progress() -> Iterator[Callable[["Track"], None]]:
    """Show a bar for each track on standard error: chunk, frames a second, bytes attended and archived."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("chunk"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    bars: dict[int, Any] = {}
    display = Progress(*columns, console=Console(file=sys.stderr))

    def advance(track: "Track") -> None:
        stats = track.stats
        held = f"{size_text(stats['attended_bytes'])} + {size_text(stats['archive_bytes'])}"
        note = f"{track.frames_per_second:.1f} fps, KV {held}"
        if id(track) not in bars:
            display.start()  # not earlier: what fails before the first chunk prints its one line and nothing else
            bars[id(track)] = display.add_task(track.stack.name, total=track.chunks, note=note)
        display.update(bars[id(track)], completed=len(track.chunk_seconds), note=note)

    try:
        yield advance
    finally:
        if bars:
            display.stop()


def _value(text: str) -> Any:
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text
