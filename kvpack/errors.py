"""Every error of kvpack: what is wrong, what was given, what would be right."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class KVPackError(Exception):
    """Base of every error that kvpack raises on purpose."""


class InvalidOptionError(KVPackError, ValueError):
    """A number, name or combination of options that cannot work."""


class UnknownNameError(InvalidOptionError):
    """A policy, stack or preset that is not installed."""


class UnusedOptionError(InvalidOptionError):
    """An option that would have no effect beside another one.

    Args:
        option: its name.
        why: what makes it so, and what would be right.
    """

    def __init__(self, option: str, why: str) -> None:
        super().__init__(f"{option} has no effect: {why}")
        self.option = option


class BudgetError(InvalidOptionError):
    """No memory fits a budget.

    Args:
        message: what is wrong, and what would be right.
        least_bytes: what would do; infinity if nothing does.
    """

    def __init__(self, message: str, least_bytes: float) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes


class UnsupportedPipelineError(KVPackError, TypeError):
    """The pipeline, or a feature that is switched on in it, cannot run through kvpack."""


class PolicyError(KVPackError, RuntimeError):
    """A policy returned something that breaks its contract."""


class AdapterError(KVPackError, RuntimeError):
    """An adapter does not do what every adapter must."""


class NonFiniteLatentsError(KVPackError, ValueError):
    """Latents hold NaN or infinity; they would poison the memory for the rest of the video."""


class GradientError(KVPackError, RuntimeError):
    """Generation ran with gradients enabled; recomputation would commit a chunk twice."""


class ParallelError(KVPackError, RuntimeError):
    """The processes that share a generation do not do the same, or one of them is gone."""


class BusyPipelineError(KVPackError, RuntimeError):
    """Two threads use one pipeline at a time."""


class OutputError(KVPackError, OSError):
    """A file that cannot be written."""


class SnapshotError(KVPackError, ValueError):
    """A snapshot that cannot be made, is damaged, or is of another generation than it is resumed with."""


class BrokenClipError(KVPackError, ValueError):
    """A training clip that cannot be used."""


class TrainingError(KVPackError, RuntimeError):
    """Training that cannot go on: it diverged, or its folder holds that of something else."""


class SnapshotWarning(UserWarning):
    """A damaged snapshot was passed over for the one before it, or versions differ."""


class PluginWarning(UserWarning):
    """A third-party plugin was left out because it failed to load."""


class BidirectionalWarning(UserWarning):
    """A model was loaded that is known not to be causal."""


def unknown_name(kind: str, given: str, installed: Iterable[str], listed: str = "Installed") -> UnknownNameError:
    """Return the error for a name that is not there, with the nearest one that is.

    >>> print(unknown_name("selector", "top_k", ["topk", "all"]))
    no selector named 'top_k'; did you mean 'topk'? Installed: all, topk
    """
    names = sorted(installed)
    near = get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return UnknownNameError(f"no {kind} named {given!r}{hint} {listed}: {', '.join(names) or 'none'}")


def require_choice(name: str, given: object, choices: Iterable[str]) -> None:
    """Raise `InvalidOptionError` if `given` is none of `choices`.

    >>> require_choice("commit", "rerun", ["rerun", "last-step"])
    """
    known = list(choices)
    if given not in known:
        raise InvalidOptionError(f"{name} must be one of {', '.join(known)}, got {given!r}")


def require_bool(name: str, given: object) -> None:
    """Check a switch.

    Raises:
        InvalidOptionError: if it is neither True nor False.
    """
    if not isinstance(given, bool):
        raise InvalidOptionError(f"{name} must be True or False, got {given!r}")


def first_line(error: Exception) -> str:
    r"""Return the first line of an error's message, or its kind where there is none.

    >>> first_line(ValueError("one\ntwo")), first_line(KeyError())
    ('one', 'KeyError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def plain(given: Any) -> Any:
    """Return NumPy's numbers, and arrays and tensors without dimensions, as Python's own, also in lists; else as it is.

    >>> import numpy as np
    >>> plain([np.int64(29), (np.float32(0.5), "a"), np.array(3)])
    [29, (0.5, 'a'), 3]
    """
    if type(given) in (list, tuple):
        return type(given)(map(plain, given))
    return given.item() if getattr(given, "ndim", None) == 0 and hasattr(given, "item") else given


def require_int(name: str, given: object, *, minimum: int = 0) -> int:
    """Return `given` if it is a whole number of at least `minimum`; it may be NumPy's, or a tensor's.

    Raises:
        InvalidOptionError: if it is not.

    >>> require_int("topk", 16)
    16
    """
    given = plain(given)
    if isinstance(given, bool) or not isinstance(given, int):
        raise InvalidOptionError(f"{name} must be a whole number >= {minimum}, got {given!r}")
    if given < minimum:
        raise InvalidOptionError(f"{name} must be >= {minimum}, got {given}")
    return given


def require_seed(given: object) -> int:
    """Return a seed of torch.

    Raises:
        InvalidOptionError: if it is no whole number, or has more than 64 bits.
    """
    if isinstance(given, bool) or not isinstance(given, int) or not -(2**63) <= given < 2**64:
        raise InvalidOptionError(f"seed must be a whole number between -2^63 and 2^64 - 1, got {given!r}")
    return given
