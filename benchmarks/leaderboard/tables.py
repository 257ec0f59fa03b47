"""Figures as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.leaderboard.bootstrap import Interval, overlap
from benchmarks.leaderboard.figures import EVENTS, RELATIVE, intervals
from benchmarks.leaderboard.store import COSTS
from benchmarks.report import Score, figure
from kvpack.evaluation import METRICS, RECALL

MEASURES = (*METRICS, RELATIVE)
RETURNS = (*RECALL, EVENTS)
PAIRED = (*METRICS, "recall")
DRIFTS = tuple(f"drift {name}" for name in METRICS)


def leaderboard(rows: Sequence[Score], subjects: Sequence[str], heroes: Sequence[str]) -> str:
    """Return a page's sections: measures at each length, returns, drift, the cost of a chunk, and the comparisons."""
    parts = []
    for seconds in sorted({row.seconds for row in rows}):
        for title, metrics in (
            ("", MEASURES),
            (", what returns and where its look is held", RETURNS),
            (", drift from first to last 5 s", DRIFTS),
            (", cost", COSTS),
        ):
            section = table(rows, subjects, seconds, metrics)
            if section:
                parts.append(f"## {seconds} s{title}\n\n{section}")
        compared = {hero: comparison(rows, subjects, seconds, hero) for hero in heroes}
        parts += [f"## {seconds} s, `{hero}` minus each\n\n{lines}" for hero, lines in compared.items() if lines]
    return "\n\n".join(parts)


def table(rows: Sequence[Score], subjects: Sequence[str], seconds: int, metrics: Sequence[str]) -> str:
    """Return a table with a line for each subject and a column for each metric; empty if there are no figures."""
    known = intervals(rows)
    columns = [name for name in metrics if any((subject, seconds, name) in known for subject in subjects)]
    lines = [
        _line([subject, *(_cell(known.get((subject, seconds, name))) for name in columns)])
        for subject in subjects
        if any((subject, seconds, name) in known for name in columns)
    ]
    return "\n".join([*_head(columns), *lines]) if lines else ""


def comparison(rows: Sequence[Score], subjects: Sequence[str], seconds: int, hero: str) -> str:
    """Return paired differences: bold if their interval excludes 0, ~ if the intervals of the two overlap."""
    known, lines = intervals(rows), []
    for rival in subjects:
        cells = []
        for name in PAIRED:
            cell = _cell(paired := known.get((f"{hero} minus {rival}", seconds, name)))
            mine, theirs = (known.get((subject, seconds, name)) for subject in (hero, rival))
            if paired and not paired.low <= 0 <= paired.high:
                cell = f"**{cell}**"
            cells.append(cell + (" ~" if paired and mine and theirs and overlap(mine, theirs) else ""))
        if any(cells):
            lines.append(_line([rival, *cells]))
    return "\n".join([*_head(PAIRED), *lines]) if lines else ""


def _head(columns: Sequence[str]) -> list[str]:
    return [
        _line(["", *(name.removeprefix("drift ").replace("_", " ") for name in columns)]),
        "|---" * (len(columns) + 1) + "|",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return ""
    value, low, high = (
        figure(number) if number == 0 or abs(number) >= 10 else f"{number:.3f}"
        for number in (interval.value, interval.low, interval.high)
    )
    return value if low == high else f"{value} [{low}, {high}]"
