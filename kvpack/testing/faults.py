"""What every check begins with, and the error that it ends with where Python or torch raise one of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace

import torch

from kvpack.errors import InvalidOptionError, KVPackError, PolicyError
from kvpack.memory.base import StateMemory
from kvpack.memory.policy import Policy

#: What options may be; a stack has policies for options.
_DATA = (int, float, str, bool, tuple, type(None), Policy)


def require_kind(given: object, kind: type, check: str) -> None:
    """Raise `InvalidOptionError` unless it is an instance of `kind`, with the check that would be right."""
    name = type(given).__name__
    if isinstance(given, type):
        raise InvalidOptionError(f"{check} tests an instance, got the class {given.__name__}; give {given.__name__}()")
    if not isinstance(given, Policy):
        raise InvalidOptionError(f"{check} tests a {kind.__name__.lower()}, got {given!r}")
    if not isinstance(given, kind):
        right = f"check_policy({name}(...))"
        raise InvalidOptionError(f"{check} tests memories, but {name} is a {given.role}; call {right}")


def require_data(policy: Policy) -> None:
    """Raise `PolicyError` unless a policy is frozen data, and equal to its own copy."""
    name = type(policy).__name__
    if not is_dataclass(policy) or not policy.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise PolicyError(f"{name} must be a frozen dataclass: policies are shared between generations")
    for option in fields(policy):
        value = getattr(policy, option.name)
        lost = isinstance(value, Policy) and isinstance(policy, StateMemory)  # a snapshot holds a stack's alone
        if not isinstance(value, _DATA) or lost or not _hashable(value):
            raise PolicyError(
                f"{name} has a field that cannot be written as data, {option.name} = {value!r}; use numbers, text and "
                "tuples"
            )
    if replace(policy) != policy:
        raise PolicyError(f"{name} does not equal its own copy; its fields must hold its whole state")


@contextmanager
def named_failure(policy: Policy, dtype: torch.dtype) -> Iterator[None]:
    """Raise what Python or torch raise in the block as a `PolicyError` that names the policy."""
    try:
        yield
    except KVPackError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:300]
        raise PolicyError(f"{type(policy).__name__} fails in {dtype}: {type(error).__name__}: {what}") from error


@contextmanager
def own_noise(policy: Policy) -> Iterator[None]:
    """Raise `PolicyError` if torch's global generator is another behind the block."""
    before = torch.get_rng_state()
    yield
    if not torch.equal(before, torch.get_rng_state()):
        raise PolicyError(
            f"{type(policy).__name__} draws from torch's global generator, or seeds it, which changes the noise of a "
            "call without a generator; draw from a torch.Generator of its own"
        )


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
