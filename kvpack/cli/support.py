"""What all commands share: reading their options, progress, tables, and errors of one line."""

import ast
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from kvpack.cli.options import DTYPES
from kvpack.errors import InvalidOptionError, KVPackError, unknown_name

if TYPE_CHECKING:
    import torch

    from kvpack.pipeline.track import Track

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
#: What torch says on any device where there is too little; "memory" alone it also says of bugs.
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory")
TRACK_COLUMNS = ("stack", "fps", "KV attended", "KV archive")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


class CommandGroup(TyperGroup):
    """Commands whose errors are one line; only a bug leaves a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            left = "; ".join(getattr(error, "__notes__", ())) or "nothing half-written was left"
            _fail(f"interrupted; {left}", TERMINATED if isinstance(error, Terminated) else INTERRUPTED)
        except BrokenPipeError:
            raise
        except (KVPackError, OSError) as error:
            _fail(in_one_line(error))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
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

    >>> parse_options(["topk=8", "compressor=pool", "archive_blocks=none", "keep_tokens=.5"])
    {'topk': 8, 'compressor': 'pool', 'archive_blocks': None, 'keep_tokens': 0.5}
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


def parse_compared(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Parse stacks with their options; a comma within brackets belongs to a value.

    Raises:
        InvalidOptionError: if an option does not read so, or comes twice.

    >>> parse_compared("packforcing:topk=4,compressor=pool, magi:previous_chunks=[3,2],full")
    [('packforcing', {'topk': 4, 'compressor': 'pool'}), ('magi', {'previous_chunks': [3, 2]}), ('full', {})]
    """
    stacks: list[tuple[str, list[str]]] = []
    for part in filter(None, map(str.strip, re.split(r",(?![^\[{(]*[\]})])", text))):
        name, colon, option = part.partition(":")
        if stacks and "=" in name:  # one more option of the stack before it
            stacks[-1][1].append(part)
        else:
            stacks.append((name.strip(), [option] if colon else []))
    return [(name, parse_options(options)) for name, options in stacks]


def parse_prompt(text: str) -> Any:
    """Parse a prompt, which is a text, or a schedule such as '[(0, "a fox"), (20, "it rests", "cut")]'.

    Raises:
        InvalidOptionError: if it begins as a schedule, but does not read so, or is one of several videos.
    """
    if re.match(r"\s*\[\s*[\[(]", text) is None:
        return text
    try:
        entries = [tuple(entry) for entry in ast.literal_eval(text.strip())]
    except (ValueError, SyntaxError, TypeError) as error:
        form = """'[(0, "a fox"), (20, "it rests", "cut")]'"""
        raise InvalidOptionError(f"--prompt is a schedule if it begins so, e.g. {form}, got {text}") from error
    if any(isinstance(part, list | tuple) for entry in entries for part in entry):
        raise InvalidOptionError(f"one video is written, so that each prompt of a schedule is one text, got {text}")
    return entries


def refuse_beside(option: str, others: Mapping[str, object]) -> None:
    """Raise `InvalidOptionError` if others were given, which are not None then, that do not go with an option."""
    if given := [name for name, value in others.items() if value is not None]:
        raise InvalidOptionError(f"{option} does not go with {', '.join(given)}; leave one out")


def default_device() -> str:
    """Return where a model runs unless told otherwise."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_dtype(name: str) -> "torch.dtype":
    """Return a dtype by name.

    Raises:
        UnknownNameError: if it is none of those that models run in.
    """
    import torch

    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return getattr(torch, name)


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


def in_one_line(error: BaseException) -> str:
    """Return what an error says, and what was noted of it: which policy raised it, say."""
    return "; ".join([str(error), *getattr(error, "__notes__", ())])


def page_file(name: str) -> str:
    """Return a part of the pages that commands write or serve."""
    return (resources.files("kvpack") / "data" / "pages" / name).read_text(encoding="utf-8")


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Return the words of a prompt that a tokenizer of whole words does not know."""
    words, unknown = prompt.split(), tokenizer.unk_token_id
    return [word for word in words if unknown in tokenizer(word, add_special_tokens=False).input_ids]


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


def print_tracks(result: Mapping[str, Any], tracks: list[dict[str, Any]], files: list[str], as_json: bool) -> None:
    """Print what was generated, as JSON or as a table."""
    if as_json:
        print_json(result)
        return
    rows = []
    for track in tracks:
        held = [size_text(track["stats"][key]) for key in ("attended_bytes", "archive_bytes")]
        rows.append([track["stats"]["stack"], f"{track['frames_per_second']:.1f}", *held])
    print_table(f"{tracks[0]['frames'] / result['fps']:g} s of video", TRACK_COLUMNS, rows)
    typer.echo(f"wrote {', '.join(files)}")


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
        display.update(bars[id(track)], completed=track.done, note=note)

    try:
        yield advance
    finally:
        if bars:
            display.stop()


def _value(text: str) -> Any:
    text = f"0{text}" if text.startswith(".") and text[1:].isdigit() else text  # .5 is no JSON
    try:
        return json.loads({"none": "null", "true": "true", "false": "false"}.get(text.lower(), text))
    except ValueError:
        return text
