"""`kvpack report`: a trace of a generation, or two of them, as one page of plotly's figures that needs no network."""

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack.checkpoints.text import parsed_json, read_text
from kvpack.cli.support import page_file
from kvpack.errors import InvalidOptionError
from kvpack.media.files import require_writable, save_bytes

#: Most bins of a heat map in each direction, whatever the length of the video.
_BINS = 240
_COLOURS = ["#0072B2", "#D55E00", "#56B4E9", "#BBBBBB", "#009E73"]
_LOOK = {"zmin": 0, "zmax": 1, "colorscale": [[0, "#FFFFFF"], [1, "#0072B2"]], "showscale": False}
_HOVER = "second %{x:.4g} looks at second %{y:.4g}: %{z:.0%} of the layers<extra></extra>"


def report(
    trace: Annotated[list[Path], typer.Argument(help="One trace, or two side by side (kvpack generate --trace).")],
    output: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
) -> None:
    r"""Draw which past a memory attends when, what it holds, and what takes time, as one HTML file.

    Needs plotly: pip install "kvpack\[report]". The page needs no network. Hover over a chunk to see its first frame.
    """
    if len(trace) > 2:
        raise InvalidOptionError(f"a report shows one trace or two side by side, got {len(trace)}")
    require_writable(output)
    save_bytes(page([read_trace(each) for each in trace]).encode(), output)
    typer.echo(f"wrote {output}")


@dataclass(frozen=True)
class Traced:
    """A trace that was read."""

    name: str
    head: dict[str, Any]
    chunks: list[dict[str, Any]]

    @property
    def seconds(self) -> list[float]:
        """The second of the video that each chunk begins at."""
        return [chunk["first_frame"] * self.head["seconds_a_frame"] for chunk in self.chunks]


def read_trace(path: Path) -> Traced:
    """Read a trace; a last line that was cut off is left out.

    Raises:
        InvalidOptionError: if it is none.
    """
    try:
        lines = read_text(path).splitlines()
        head, chunks = parsed_json(lines[0]), []
        for number, line in enumerate(lines[1:], 2):
            try:
                chunks.append(parsed_json(line))
            except ValueError:
                if number < len(lines):
                    raise
        needed = {"stack", "layers", "seconds_a_frame"} <= set(head) and chunks and "attended" in chunks[0]
    except OSError as error:
        raise InvalidOptionError(f"cannot read {path}: {error.strerror}; give a trace of kvpack generate") from error
    except (ValueError, IndexError, TypeError) as error:
        raise InvalidOptionError(
            f"{path} is not a trace of kvpack: {error}; give one of kvpack generate --trace"
        ) from error
    if not needed:
        raise InvalidOptionError(f"{path} holds no chunk of a trace; give one of kvpack generate --trace")
    return Traced(path.name, head, chunks)


def heat(trace: Traced, layer: int | None) -> tuple[list[float], list[float], list[list[float]]]:
    """Return chunk times, times of the past, and how much of each is attended, by one layer or all on average."""
    frames = max(chunk["first_frame"] + chunk["frames"] for chunk in trace.chunks)
    wide = max(1, -(-len(trace.chunks) // _BINS))
    high = max(1.0, frames / _BINS)
    columns, rows = trace.chunks[::wide], min(_BINS, frames)
    cells = [[0.0] * len(columns) for _ in range(rows)]
    for column, chunk in enumerate(columns):
        told = [each for each in chunk["attended"] if layer in (None, each["layer"])]
        for each in told:
            bins = [(int(first / high), int((first + length - 1e-9) / high) + 1) for first, length in _ranges(each)]
            for row in {row for first, stop in bins for row in range(max(0, first), min(rows, stop))}:
                cells[row][column] += 1 / len(told)
    step = trace.head["seconds_a_frame"]
    return trace.seconds[::wide], [row * high * step for row in range(rows)], cells


def _ranges(each: dict[str, Any]) -> list[tuple[float, float]]:
    """Frames of a stack; of another memory the positions of its tokens, which are single ones at both ends."""
    if "frames" in each:
        return [(first, frames) for first, frames, _ in each["frames"]]
    return [(first, length + 1) for first, length in each.get("positions", [])]


def figures(trace: Traced) -> list[Any]:
    """Draw a trace: the past that is attended, bytes, seconds, and drift."""
    import plotly.graph_objects as go

    def stacked(key: str, title: str, unit: float) -> Any:
        series = {part: [chunk[key][part] / unit for chunk in trace.chunks] for part in trace.chunks[0][key]}
        drawn = [
            go.Bar(x=trace.seconds, y=values, name=part, marker={"color": colour})
            for (part, values), colour in zip(series.items(), _COLOURS, strict=False)
        ]
        return go.Figure(drawn, {"title": title, "barmode": "stack", "bargap": 0})

    drift = go.Figure(
        [
            go.Scatter(x=trace.seconds, y=[chunk[key] for chunk in trace.chunks], name=name)
            for key, name in (("drift", "means of the latents"), ("contrast", "spread, 1 is the first chunk's"))
        ],
        {"title": "drift from the first chunk"},
    )
    made = [
        _attention(trace),
        stacked("bytes", "held, MB", 1e6),
        stacked("seconds", "seconds a chunk, by phase", 1),
        drift,
    ]
    for each in made:
        each.update_xaxes(title="second of the video")
        each.update_layout(height=340, margin={"t": 60, "b": 45, "l": 55, "r": 15}, plot_bgcolor="white")
        each.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"})
        each.update_layout(title={"x": 0.01, "xanchor": "left"})
    return made


def _attention(trace: Traced) -> Any:
    import plotly.graph_objects as go

    choices: list[tuple[str, int | None]] = [("all layers", None)]
    choices += [(f"layer {layer}", layer) for layer in trace.head["layers"]]
    maps: list[Any] = []
    for _, layer in choices:
        x, y, z = heat(trace, layer)
        maps.append(go.Heatmap(x=x, y=y, z=z, visible=not maps, hovertemplate=_HOVER, **_LOOK))
    made = go.Figure(maps)
    buttons = [
        {"label": name, "method": "update", "args": [{"visible": [name == other for other, _ in choices]}]}
        for name, _ in choices
    ]
    made.update_layout(
        title="which past is attended when", updatemenus=[{"buttons": buttons, "x": 1, "y": 1.18, "xanchor": "right"}]
    )
    whole = "frames" in trace.chunks[-1]["attended"][0] if trace.chunks[-1]["attended"] else True
    made.update_yaxes(title="second of the past" if whole else "position of its tokens, seconds")
    return made


def page(traces: list[Traced]) -> str:
    """Return one HTML file with everything inside.

    Raises:
        InvalidOptionError: if plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InvalidOptionError('a report needs plotly; pip install "kvpack[report]"') from error
    columns = "\n".join(_column(index, trace) for index, trace in enumerate(traces))
    pictures = _in_script([[chunk.get("picture") for chunk in trace.chunks] for trace in traces])
    starts = _in_script([trace.seconds for trace in traces])
    script = page_file("report.js").replace("STARTS", starts).replace("PICTURES", pictures)
    return page_file("report.html").format(plotly=get_plotlyjs(), columns=columns, script=script)


def _column(index: int, trace: Traced) -> str:
    head = trace.head
    told = f"{head['stack']}: {head.get('prompt') or trace.name}"
    drawn = "\n".join(
        f'<div class="figure" id="figure-{index}-{number}" data-trace="{index}"></div>'
        f'<script>drawings["figure-{index}-{number}"] = [{_plain(each)}];</script>'
        for number, each in enumerate(figures(trace))
    )
    return (
        f'<section><h2>{html.escape(told)}</h2><p class="frame"><img id="frame-{index}" alt=""> '
        f'<span id="when-{index}">Hover over a figure to see the frame.</span></p>{drawn}</section>'
    )


def _plain(figure: Any) -> str:
    """Return data and layout as arguments of a script."""
    data = json.loads(figure.to_json())
    data["layout"].pop("template", None)
    return ", ".join(map(_in_script, (data["data"], data["layout"], {"responsive": True, "displayModeBar": False})))


def _in_script(data: Any) -> str:
    """Return data as JSON, in which no text can end the script that it stands in."""
    return json.dumps(data).replace("<", "\\u003c")
