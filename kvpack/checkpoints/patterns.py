"""Patterns of modules' names in PEFT's configs: regular expressions of strangers, which may be matched for ever."""

import re
from collections.abc import Collection, Iterable

_MOST_PATTERN, _MOST_NAME = 500, 256
#: Steps that all matches of a file may take together, about ten seconds; each begins with a thousand.
_MOST_STEPS, _BEGIN = 10**9, 1000
_BEFORE, _BEHIND = r"(.*\.)?(", ")$"
_CLASS, _LITERAL = r"\[\^?\]?(?:\\.|[^\]\\])*\]", r"\\[^A-Za-z0-9]"
_ALLOWED = f"at most {_MOST_PATTERN} characters, and * + {{}} behind a character or [...], not behind a group (...)"


def compiled(pattern: str) -> re.Pattern[str]:
    """Return what matches the modules' names that end with a pattern, as PEFT does.

    Raises:
        ValueError: if it is no pattern, or repeats what has repetitions or alternatives in it.
    """
    said = f"{pattern[:80]!r} is no pattern of PEFT's that is taken: "
    if len(pattern) > _MOST_PATTERN:
        raise ValueError(f"{said}{_ALLOWED} are allowed")
    try:
        whole = re.compile(f"{_BEFORE}{pattern}{_BEHIND}")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{said}{error}") from error
    # `(?`: flags and references are left of it. `)*`: a repeated group may match in exponentially many ways.
    if re.search(r"\(\?|\)\*", _simplified(pattern)):
        raise ValueError(f"{said}it could be matched for ever; {_ALLOWED} are allowed")
    return whole


def require_quick(patterns: Iterable[re.Pattern[str]], names: Collection[str]) -> None:
    """Raise `ValueError` if matching patterns that `compiled` takes with the names of modules may take too long."""
    longest = max((len(name) for name in names), default=0)
    if longest > _MOST_NAME or not all(name.isprintable() for name in names):
        raise ValueError(f"a module's name has {longest} characters; at most {_MOST_NAME}, all printable, are allowed")
    dots, spent = max((name.count(".") for name in names), default=0), 0
    for each in patterns:
        pattern = each.pattern.removeprefix(_BEFORE).removesuffix(_BEHIND)
        spent += len(names) * (_BEGIN + _steps(pattern, longest, dots))
        if spent > _MOST_STEPS:
            raise ValueError(
                f"its patterns up to {pattern[:80]!r} take too long for {len(names)} modules with names of up to "
                f"{longest} characters; fewer patterns, or ones with fewer * + ? {{}} and |, are allowed"
            )


def _steps(pattern: str, length: int, dots: int) -> int:
    """Return how many ways there are at most to match a pattern: places of repetitions, alternatives, beginnings."""
    plain = _simplified(pattern)
    ways = 1
    for group in re.findall(r"\(([\w|]*)\)", plain):  # of words only those match that begin with each other
        words = group.split("|")
        ways *= max(sum(word.startswith(other) for other in words) for word in words)
    rest = re.sub(r"\([\w|]*\)", "", plain)
    groups, bars = rest.count("(") + 1, rest.count("|")
    alternatives = 1 + (bars + groups - 1) // groups  # in each group, if there are as many in all
    ways *= alternatives**groups * 2 ** rest.count("?")
    begun = 1 if rest.startswith("^") and not bars else dots + 1
    # What is repeated at the very end takes all that is left at once.
    return int(ways * begun * (length + 1) ** rest.removesuffix(".*").count("*"))


def _simplified(pattern: str) -> str:
    """Return a pattern with `*` for each repetition, `_` for what is escaped, `,` for classes, `(` for any group."""
    plain = re.sub(rf"({_LITERAL})|\\.|{_CLASS}", lambda found: "_" if found[1] else ",", pattern)
    plain = re.sub(r"\(\?(?:[:=!]|<[=!]|P<\w+>)", "(", plain)
    # A repetition that takes as little as it can is none that takes all that is left.
    return re.sub(r"(?:[*+]|\{[\d,]+\})([?+]?)", lambda found: "*," if found[1] else "*", plain)
