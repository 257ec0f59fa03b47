"""The log of a training run: a CSV file of step, name and value."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from kvpack.errors import OutputError
from kvpack.media.files import save_bytes

_HEADER = ["step", "name", "value"]


def append_log(path: Path, step: int, told: Mapping[str, float]) -> None:
    """Append what a step told.

    Raises:
        OutputError: if it cannot be written.
    """
    new = not path.exists()
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            if new:
                rows.writerow(_HEADER)
            rows.writerows([step, name, value] for name, value in told.items())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; the last checkpoint can be gone on from") from error


def cut_log(path: Path, step: int) -> None:
    """Drop rows after a step, which will be done and logged again, and what a crash has left of others.

    Raises:
        OutputError: if it cannot be written.
    """
    if not path.exists():
        return
    # A crash may have cut the last line, even inside a letter.
    whole = path.read_bytes().decode(errors="replace").rpartition("\n")[0]
    rows = [row for row in csv.reader(whole.splitlines()) if len(row) == len(_HEADER)]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([_HEADER, *(row for row in rows if row[0].isdecimal() and int(row[0]) <= step)])
    save_bytes(text.getvalue().encode(), path)
