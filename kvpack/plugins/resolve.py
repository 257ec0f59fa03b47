"""Names, options and plain data resolved to a memory."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from kvpack.checkpoints.config import Settings
from kvpack.errors import InvalidOptionError, UnusedOptionError
from kvpack.memory.base import Memory
from kvpack.memory.stack import ROLES, Stack
from kvpack.plugins.registry import registry, require_instance

#: Options that say what a model was trained with, whatever its memory is.
_OF_THE_MODEL = {"chunk_frames", "train_frames"}


@dataclass(frozen=True)
class NamedStack:
    """An installed stack and its options, which can be made again with others.

    Args:
        name: of the stack.
        options: each has an effect, or is refused.
        offered: options that hold where they have an effect beside the others.
        asked: names of the options that the user gave himself.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    offered: Mapping[str, Any] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()

    def made(self, **changes: Any) -> Memory:
        """Return the memory, with some options changed; raises what `Registry.stack` does."""
        options = {**self.options, **changes}
        try:
            return registry().stack(self.name, options, self.offered)
        except InvalidOptionError as error:
            with suppress(InvalidOptionError):
                registry().stack(self.name, options)  # what is wrong is then what the model offers
                told = ", ".join(f"{name}={value}" for name, value in self.offered.items() if name not in options)
                error.add_note(f"{told} is what the model was made for, unless you say otherwise")
            raise

    def default(self, option: str) -> Any:
        """Return what an option is where nobody gives it; None if the stack does not take it."""
        taken = inspect.signature(registry().stacks[self.name]).parameters
        return taken[option].default if option in taken else None


def named_stack(
    stack: str | Memory | Mapping[str, Any] | None,
    options: Mapping[str, Any],
    settings: Settings | None = None,
    defaults: Callable[[str], Mapping[str, Any]] | None = None,
) -> NamedStack | None:
    """Return the named stack that is meant; None for a memory that is given whole. Arguments as of `resolve_stack`."""
    settings, asked = settings or Settings(), frozenset(options)
    file: Mapping[str, Any] = {}
    if stack == settings.stack:
        file = settings.options
    elif isinstance(stack, str):
        file = registry().taken(stack, {name: settings.options[name] for name in _OF_THE_MODEL & {*settings.options}})
    elif stack is None:
        stack, file = settings.stack, settings.options
        if not options:
            options, file = file, {}  # the file's options must have an effect, unless the user's say otherwise
    if not isinstance(stack, str):
        return None
    family = registry().taken(stack, defaults(stack)) if defaults else {}
    return NamedStack(stack, options, {**family, **file}, asked)  # the model's file knows better than its family


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
        settings: the model's own; with another stack than theirs, the lengths hold that the model was trained with.
        defaults: what a family knows to be better for it than the own defaults of a stack by name.

    Raises:
        InvalidOptionError: if options are given with anything but a name, or are wrong.
    """
    named = named_stack(stack, options, settings, defaults)
    if named is not None:
        return named.made()
    assert stack is not None
    assert not isinstance(stack, str)
    if options:
        raise InvalidOptionError(
            f"options {sorted(options)} belong to a named stack; use dataclasses.replace on a Stack"
        )
    if not isinstance(stack, Mapping):
        require_instance("memory", stack)
        return stack
    if "memory" in stack:
        return registry().policy("memory", stack["memory"], {k: v for k, v in stack.items() if k != "memory"})
    return stack_from_dict(stack)


def resolve_policy(role: str, policy: object, usual: Mapping[str, Any], **asked: Any) -> Any:
    """Return a policy of a stack: an instance as it is, a name with those options of the stack that it takes.

    Args:
        role: its role.
        policy: name or instance.
        usual: values of the options where none was asked for.
        asked: options of the stack that are the policy's; None where none was asked for.

    Raises:
        UnusedOptionError: if an option was asked for that the policy does not take.
        InvalidOptionError: as `Registry.policy`.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if not isinstance(policy, str):
        return registry().policy(role, policy, given)
    cls = registry().policies.get((role, policy))  # an unknown name is refused by `policy` below
    taken = inspect.signature(cls).parameters if cls else {}
    made = registry().policy(role, policy, {name: each for name, each in {**usual, **given}.items() if name in taken})
    if unused := next((name for name in given if name not in taken), None):
        raise UnusedOptionError(unused, f"{role} {policy!r} does not take it; leave it out")
    return made


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
    for name, role in (*zip(ROLES, ROLES, strict=True), ("store", "codec")):
        if name in data:
            options = dict(data[name])
            policies[name] = registry().policy(role, str(options.pop("policy", None)), options)
    return Stack(**{**data, **policies})


def require_stack(memory: Memory) -> Stack:
    """Return `memory` if it is a `Stack`, whose compressor can be chosen.

    Raises:
        InvalidOptionError: if it is no `Stack`.
    """
    if not isinstance(memory, Stack):
        raise InvalidOptionError(f"{memory.name} has no compressor; give a stack that has, e.g. packforcing")
    return memory
