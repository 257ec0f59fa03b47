"""`kvpack report`: a trace of a generation, or two of them, as one page that needs no network."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    trace: Annotated[list[Path], typer.Argument(help="One trace, or two side by side (kvpack generate --trace).")],
    output: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
) -> None:
    r"""Draw which past a memory attends when, what it holds, and what takes time, as one HTML file.

    Needs plotly: pip install "kvpack\[report]". The page needs no network. Hover over a chunk to see its first frame.
    """
    from kvpack.cli.report_page import page, read_trace
    from kvpack.errors import InvalidOptionError
    from kvpack.media.files import require_writable, save_bytes

    if len(trace) > 2:
        raise InvalidOptionError(f"a report shows one trace or two side by side, got {len(trace)}")
    require_writable(output)
    save_bytes(page([read_trace(each) for each in trace]).encode(), output)
    typer.echo(f"wrote {output}")
