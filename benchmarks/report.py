"""Rows of figures: how every benchmark measures, prints, keeps and judges them."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, overload

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SMALL_RESULTS = ROOT / "runs" / "benchmarks"
SEED = 0


@dataclass(frozen=True)
class Row:
    """One figure.

    Args:
        subject: what was measured.
        metric: which of its properties.
        value: the figure; a median where there are several samples.
        low: least sample, or lower end of a 95 % bootstrap interval, as the script's docstring says.
        high: the same at the other end.
        unit: unit of the three.
        n: number of samples.
        command: how to measure it again.
        commit: the source that was measured.
    """

    subject: str
    metric: str
    value: float
    low: float
    high: float
    unit: str
    n: int
    command: str = ""
    commit: str = ""


@dataclass(frozen=True)
class Score:
    """One measure of videos.

    Args:
        subject: what made the videos.
        seconds: their length, or the end of the part that was measured, as the script's docstring says.
        metric: which measure.
        value: its mean over the videos.
        low: lower end of a 95 % bootstrap interval.
        high: upper end.
        n: videos of which it can be said.
        command: how to measure it again.
        commit: the source that made the videos.
    """

    subject: str
    seconds: int
    metric: str
    value: float
    low: float
    high: float
    n: int
    command: str = ""
    commit: str = ""


Figure = TypeVar("Figure", Row, Score)


@dataclass(frozen=True)
class Bar:
    """What a figure must not exceed.

    Args:
        text: the promise in words.
        subject: how the row's subject begins.
        metric: how its metric begins.
        at_most: the limit.
        timed: whether the figure depends on the machine and the size, so that a small run cannot judge it.
    """

    text: str
    subject: str
    metric: str
    at_most: float
    timed: bool = True

    def verdict(self, rows: Sequence[Row]) -> str:
        """One line: the promise, the worst of its figures and whether it is kept."""
        found = [row for row in rows if row.subject.startswith(self.subject) and row.metric.startswith(self.metric)]
        if not found:
            return f"NOT MEASURED  {self.text}"
        worst = max(found, key=lambda row: row.value)
        met = "met    " if worst.value <= self.at_most else "NOT MET"
        return f"{met}  {self.text} (at most {figure(self.at_most)}): {figure(worst.value)}"


def samples(subject: str, metric: str, values: Sequence[float], unit: str) -> Row:
    """Median, least and greatest of some samples."""
    return Row(subject, metric, median(values), min(values), max(values), unit, len(values))


def median_ratio(subject: str, metric: str, late: Sequence[float], early: Sequence[float]) -> Row:
    """Ratio of two medians with its 95 % bootstrap interval (2,000 resamples, seeded)."""
    draw = random.Random(SEED)
    ratios = sorted(
        median(draw.choices(late, k=len(late))) / median(draw.choices(early, k=len(early))) for _ in range(2000)
    )
    return Row(subject, metric, median(late) / median(early), ratios[50], ratios[-51], "ratio", len(late) + len(early))


def figure(value: float) -> str:
    """Four significant digits, and no exponent where a person would write none."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def table(rows: Sequence[Row]) -> str:
    """Columns for a person, one block of lines a subject."""
    lines = [f"{'':54}{'value':>12}{'low':>12}{'high':>12}  {'unit':8}{'n':>6}"]
    subject = ""
    for row in rows:
        if row.subject != subject:
            subject = row.subject
            lines.append(subject)
        numbers = "".join(f"{figure(number):>12}" for number in (row.value, row.low, row.high))
        lines.append(f"  {row.metric:52}{numbers}  {row.unit:8}{row.n:>6}")
    return "\n".join(lines)


def commit() -> str:
    """Short hash of the source measured, marked if the tree differs from it; "unknown" outside a checkout."""
    try:
        paths = ["--", "kvpack", "adapters", "policies", "benchmarks/*.py"]
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("-dirty" if _git("status", "--porcelain", *paths) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(name: str, rows: Sequence[Row] | Sequence[Score], folder: Path) -> Path:
    """Keeps rows as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")
    return path


def merged(path: Path, figures: Sequence[Figure]) -> list[Figure]:
    """Figures of a file, if there is one, where these (at least one) take the places of those of the same names."""

    def name(each: Figure) -> tuple[Any, ...]:
        return each.subject, getattr(each, "seconds", None), each.metric

    new = {name(each) for each in figures}
    old = read(path, type(figures[0])) if path.exists() else []
    return [each for each in old if name(each) not in new] + list(figures)


@overload
def read(path: Path) -> list[Row]: ...
@overload
def read(path: Path, kind: type[Figure]) -> list[Figure]: ...
def read(path: Path, kind: Any = Row) -> Any:
    """Rows, or scores, from a file.

    Raises:
        ValueError: if it holds anything else.
    """
    names = {field.name for field in fields(kind)}
    data = json.loads(path.read_text())
    for each in data:
        if set(each) != names or not each["low"] <= each["value"] <= each["high"] or each["n"] < 1:
            raise ValueError(f"{path.name}: not a row: {each}")
    return [kind(**each) for each in data]


def parser(doc: str) -> argparse.ArgumentParser:
    """Options that all benchmarks share."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--small", action="store_true", help="seconds instead of minutes; the figures mean nothing")
    made.add_argument(
        "--out", type=Path, help="folder of the JSON (default: benchmarks/results, small: runs/benchmarks)"
    )
    return made


def folder(options: argparse.Namespace) -> Path:
    """Where rows are written; a small run never replaces real figures."""
    chosen: Path = options.out or (SMALL_RESULTS if options.small else RESULTS)
    return chosen


def script(name: str, doc: str, run: Callable[[bool], list[Row]], bars: Sequence[Bar]) -> None:
    """The whole command line of a benchmark."""
    options = parser(doc).parse_args()
    command = " ".join(["python", "-m", f"benchmarks.{name}", *(["--small"] if options.small else [])])
    source = commit()
    rows = [replace(row, command=command, commit=source) for row in run(options.small)]
    print(f"\n{doc.strip().splitlines()[0]}\n{table(rows)}")
    for bar in bars:
        if not (options.small and bar.timed):
            print(bar.verdict(rows))
    print(f"written to {write(name, rows, folder(options))}", flush=True)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def say(text: str) -> None:
    """Progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)
