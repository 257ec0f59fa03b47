"""Sections under one budget of time: each is measured, fails by itself, or is skipped, and the file says which."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.report import Row, figure, say


class OutOfTime(Exception):
    """The budget ended inside a section."""


@dataclass
class Section:
    """A part of the measurement.

    Args:
        name: what it measures.
        state: "measured", "failed" or "skipped".
        seconds: that it took.
        note: why it failed or was skipped, or what is to be known of it.
        rows: its figures; those of a failed section are what it had before it failed.
    """

    name: str
    state: str = "skipped"
    seconds: float = 0.0
    note: str = ""
    rows: list[Row] = field(default_factory=list)


class Bench:
    """Runs sections, the most valuable first, and writes the file anew behind each.

    Args:
        seconds: the whole budget.
        path: the file.
        facts: of the machine.
    """

    def __init__(self, seconds: float, path: Path, facts: dict[str, Any]) -> None:
        self.begun, self.limit, self.path, self.facts = time.monotonic(), seconds, path, facts
        self.sections: list[Section] = []

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.limit - (time.monotonic() - self.begun)

    def section(self, name: str, needs: float, measure: Callable[[list[Row]], str | None]) -> None:
        """Measure a part if time is left for it.

        Args:
            name: what it measures.
            needs: seconds that it is thought to take.
            measure: appends rows to the list that it is given, and may return a note.
        """
        section = Section(name)
        self.sections.append(section)
        if self.left < needs:
            section.note = f"{max(0.0, self.left):.0f} s were left, and it may need {needs:.0f}"
        else:
            say(f"gpu: {name} ({self.left:.0f} s left)")
            self._measured(section, measure)
        self.write()

    def _measured(self, section: Section, measure: Callable[[list[Row]], str | None]) -> None:
        start = time.monotonic()
        try:
            with alarm(self.left):
                section.note = measure(section.rows) or ""
            section.state = "measured"
        except Exception as error:  # whatever one card or package cannot do, the others are measured
            section.state = "failed"
            section.note = f"{type(error).__name__}: {error}".strip()[:600]
        section.seconds = time.monotonic() - start
        with suppress(RuntimeError):  # a card that has failed fails here again
            torch.cuda.empty_cache()

    def write(self) -> None:
        """Write everything so far."""
        sections = [asdict(section) for section in self.sections]
        spent = time.monotonic() - self.begun
        text = json.dumps({"machine": self.facts, "seconds": spent, "sections": sections}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text + "\n")

    def show(self, console: Console) -> None:
        """Print a table of each section."""
        for section in self.sections:
            title = f"{section.name}: {section.state} in {section.seconds:.0f} s"
            console.print(f"\n[bold]{title}[/bold]" + (f"; {escape(section.note)}" if section.note else ""))
            if section.rows:
                console.print(_table(section.rows))


def _table(rows: list[Row]) -> Table:
    table = Table("", "value", "low", "high", "unit", box=SIMPLE_HEAD)
    for column in table.columns[1:4]:
        column.justify = "right"
    before = ""
    for row in rows:
        if row.subject != before:
            before = row.subject
            table.add_row(f"[bold]{escape(row.subject)}[/bold]")
        numbers = (figure(number) for number in (row.value, row.low, row.high))
        table.add_row(f"  {escape(row.metric)}", *numbers, row.unit)
    return table


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after some seconds, where the system has such alarms."""

    def ring(*_: Any) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s, when the time was out")

    if not hasattr(signal, "SIGALRM") or seconds <= 0:
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one(subject: str, metric: str, value: float, unit: str) -> Row:
    """Return a figure that was measured once, or counted."""
    return Row(subject, metric, float(value), float(value), float(value), unit, 1)
