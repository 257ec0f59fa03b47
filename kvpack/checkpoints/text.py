"""Text files of other people's editors."""

import json
from pathlib import Path
from typing import Any

from kvpack.errors import InvalidOptionError

#: Bytes of the largest config; Python's objects take twenty times what their JSON does.
_MOST_JSON = 1 << 20
#: Bytes and lines of the largest file of prompts.
_MOST_TEXT, _MOST_LINES = 1 << 27, 100_000


def read_text(path: Path) -> str:
    """Read UTF-8 text without the byte order mark that editors on Windows put before it.

    Raises:
        OSError: if the file cannot be read.
        UnicodeDecodeError: if it is not UTF-8.
    """
    return path.read_text(encoding="utf-8-sig")


def read_json(path: Path) -> Any:
    """Read a config.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no JSON, or larger than any config.
    """
    if (size := path.stat().st_size) > _MOST_JSON:
        raise ValueError(f"it has {size} bytes, but a config has at most {_MOST_JSON}")
    return parsed_json(read_text(path))


def read_config(path: Path) -> dict[str, Any]:
    """Read a config that is an object, of a pipeline or of one of its parts.

    Raises:
        InvalidOptionError: if it cannot be read, or is none.
    """
    try:
        data = read_json(path)
    except OSError as error:
        raise InvalidOptionError(f"cannot read {path}: {error.strerror}; give a diffusers pipeline's folder") from error
    except ValueError as error:
        raise InvalidOptionError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise InvalidOptionError(f"{path} must hold a JSON object, got a {type(data).__name__}")
    return data


def parsed_json(text: str) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: if it is none, or nested without end.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file that are not blank, without white space around them.

    Raises:
        OSError: if the file cannot be read.
        UnicodeDecodeError: if it is not UTF-8.
    """
    return [line for _, line in numbered_lines(path)]


def prompt_lines(path: Path) -> list[tuple[int, str]]:
    """Read the numbered lines of a file of prompts, each of which becomes objects many times its size.

    Raises:
        InvalidOptionError: if it cannot be read, is not UTF-8, or larger than any such file.
    """
    try:
        if (size := path.stat().st_size) > _MOST_TEXT:
            raise InvalidOptionError(f"{path} has {size} bytes, but prompts have at most {_MOST_TEXT}; split the file")
        lines = numbered_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise InvalidOptionError(f"cannot read {path}: {reason}; give a text file with one prompt a line") from error
    if len(lines) > _MOST_LINES:
        count = len(lines)
        raise InvalidOptionError(f"{path} has {count} lines, but prompts have at most {_MOST_LINES}; split the file")
    if long := next((number for number, line in lines if len(line) > _MOST_JSON), None):
        raise InvalidOptionError(f"{path}: line {long} is longer than {_MOST_JSON} characters, which no prompt is")
    return lines


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Read the same with the number of each line in the file, from 1 on; raises the same."""
    # Not `splitlines`, which also ends a line at what pasted captions hold inside, such as U+2028 and U+0085.
    return [(number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
