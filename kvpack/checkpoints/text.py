"""Text files of other people's editors."""

from pathlib import Path


def read_text(path: Path) -> str:
    """Read UTF-8 text without the byte order mark that editors on Windows put before it.

    Raises:
        OSError: if the file cannot be read.
        UnicodeDecodeError: if it is not UTF-8.
    """
    return path.read_text(encoding="utf-8-sig")


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file that are not blank, without white space around them.

    Raises:
        OSError: if the file cannot be read.
        UnicodeDecodeError: if it is not UTF-8.
    """
    return [line for _, line in numbered_lines(path)]


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Read the same with the number of each line in the file, from 1 on; raises the same."""
    # Not `splitlines`, which also ends a line at what pasted captions hold inside, such as U+2028 and U+0085.
    return [(number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
