"""Names, options and plain data resolved to a memory."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from kvpack.checkpoints.config import Settings
from kvpack.errors import InvalidOptionError
from kvpack.memory.base import Memory
from kvpack.memory.stack import ROLES, Stack
from kvpack.plugins.registry import registry


def resolve_stack(
    stack: str | Memory | Mapping[str, Any] | None,
    options: Mapping[str, Any],
    settings: Settings | None = None,
    defaults: Callable[[str], Mapping[str, Any]] | None = None,
) -> Memory:
    """Return the memory that a name with options, a dict, a `Stack` or a model's own settings stand for.

    Args:
        stack: the name, dict or `Stack`; None takes the settings'.
        options: options of the named stack.
        settings: the model's own.
        defaults: what a family knows to be better for it than the own defaults of a stack by name.

    Raises:
        InvalidOptionError: if options are given with anything but a name, or are wrong.
    """
    if stack is None:
        settings = settings or Settings()
        stack, options = settings.stack, {**settings.options, **options}
    if isinstance(stack, str):
        own = registry().taken(stack, defaults(stack)) if defaults else {}
        return registry().stack(stack, {**own, **options})
    if options:
        raise InvalidOptionError(
            f"options {sorted(options)} belong to a named stack; use dataclasses.replace on a Stack"
        )
    if isinstance(stack, Memory):
        return stack
    if "memory" in stack:
        return registry().policy("memory", stack["memory"], {k: v for k, v in stack.items() if k != "memory"})
    return stack_from_dict(stack)


def stack_from_dict(data: Mapping[str, Any]) -> Stack:
    """Return the stack that `Stack.to_dict` described, its policies found by name.

    Raises:
        UnknownNameError: if a policy is not installed.
        InvalidOptionError: if a field is missing or unknown.
    """
    unknown = set(data) - {field.name for field in fields(Stack)}
    missing = {"name", *ROLES} - set(data)
    if unknown or missing:
        raise InvalidOptionError(
            f"a stack needs name, {', '.join(ROLES)}; missing {sorted(missing)}, unknown {sorted(unknown)}"
        )
    policies = {}
    for role in ROLES:
        options = dict(data[role])
        name = options.pop("policy", None)
        policies[role] = registry().policy(role, str(name), options)
    return Stack(**{**data, **policies})


def require_stack(memory: Memory) -> Stack:
    """Return `memory` if it is a `Stack`, whose compressor can be chosen.

    Raises:
        InvalidOptionError: if it is no `Stack`.
    """
    if not isinstance(memory, Stack):
        raise InvalidOptionError(f"{memory.name} has no compressor; give a stack that has, e.g. packforcing")
    return memory
