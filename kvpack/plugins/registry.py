"""What is installed: policies, stacks and adapters, all found through the entry-point group `kvpack`."""

import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pluggy

from kvpack.errors import InvalidOptionError, PluginWarning, unknown_name
from kvpack.generation.adapter import Adapter
from kvpack.memory.base import Memory
from kvpack.memory.roles import Policy
from kvpack.plugins import hookspecs


@dataclass(frozen=True)
class Failure:
    """A plugin that was left out, and why."""

    plugin: str
    package: str
    error: str


class Registry:
    """Policies, stacks and adapters by name, from the entry points of installed packages.

    Args:
        entry_points: what to load; each in its own `try`, so that a broken plugin costs a warning only.
    """

    def __init__(self, entry_points: Iterable[importlib.metadata.EntryPoint]) -> None:
        self.policies: dict[tuple[str, str], type[Policy]] = {}
        self.stacks: dict[str, Callable[..., Memory]] = {}
        self.adapters: dict[str, Adapter] = {}
        #: Package that each (kind, name) came from.
        self.origins: dict[tuple[str, str], str] = {}
        #: Plugins that were left out.
        self.failures: list[Failure] = []
        #: Who else wants a (kind, name) of a third party: nobody can say whose is meant.
        self._rivals: dict[tuple[str, str], str] = {}
        for entry_point in entry_points:
            try:
                self._load(entry_point)
            except (Exception, SystemExit) as error:  # whatever a plugin does, the others still load
                message = f"kvpack plugin {entry_point.name!r} ({entry_point.value}) was left out: {error!r}"
                self.failures.append(
                    Failure(entry_point.name, _package(entry_point), f"{type(error).__name__}: {error}")
                )
                warnings.warn(message, PluginWarning, stacklevel=2)

    def _load(self, entry_point: importlib.metadata.EntryPoint) -> None:
        plugin = entry_point.load()
        # A manager of its own, so that a plugin that fails halfway has registered nothing.
        manager = pluggy.PluginManager("kvpack")
        manager.add_hookspecs(hookspecs)
        manager.register(plugin, name=entry_point.name)
        manager.check_pending()
        package = _package(entry_point)
        found: list[tuple[str, str, Any]] = []
        manager.hook.kvpack_register_policies(register=lambda cls: found.extend(_as_installed(cls)))
        manager.hook.kvpack_register_stacks(register=lambda name, factory: found.append(("stack", name, factory)))
        manager.hook.kvpack_register_adapters(register=lambda adapter: found.append(("adapter", adapter.name, adapter)))
        names = [(kind, name) for kind, name, _ in found]
        if twice := next((each for each in names if names.count(each) > 1), None):
            raise InvalidOptionError(f"{package} registers {twice[0]} {twice[1]!r} twice")
        taken = [(kind, name) for kind, name, _ in found if (kind, name) in self.origins]
        self._rivals.update({key: package for key in taken if self.origins[key] != "kvpack"})
        if taken:
            kind, name = taken[0]
            first = self.origins[kind, name]
            raise InvalidOptionError(f"{kind} {name!r} is already installed by {first}; {package} wants it too")
        for kind, name, thing in found:
            self.origins[kind, name] = package
            if kind == "stack":
                self.stacks[name] = thing
            elif kind == "adapter":
                self.adapters[name] = thing
            else:
                self.policies[kind, name] = thing

    def names(self, kind: str) -> list[str]:
        """Return the installed names of a role, of "stack" or of "adapter", sorted."""
        return sorted(name for each, name in self.origins if each == kind)

    def policy(self, role: str, policy: object, options: dict[str, Any] | None = None) -> Any:
        """Return a policy of `role` by name, with the options that it takes; an instance is returned as it is.

        Raises:
            UnknownNameError: if no policy of that name is installed.
            InvalidOptionError: if two packages want the name, or an option is unknown or wrong.
        """
        if isinstance(policy, Policy):
            return policy
        self._check_name(role, str(policy))
        return _call(f"{role} {policy}", self.policies[role, str(policy)], options or {})

    def stack(self, name: str, options: dict[str, Any]) -> Memory:
        """Return a stack by name, with its options as keywords.

        Raises:
            UnknownNameError: if no stack of that name is installed.
            InvalidOptionError: if two packages want the name, or an option is unknown or wrong.
        """
        self._check_name("stack", name)
        return _call(f"stack {name}", self.stacks[name], options)

    def taken(self, stack: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return those options that a stack by name takes; none if the stack is not installed."""
        factory = self.stacks.get(stack)
        known = inspect.signature(factory).parameters if factory else {}
        return {name: value for name, value in options.items() if name in known}

    def adapter(self, pipeline_class: type) -> Adapter | None:
        """Return the adapter that drives pipelines of a class, if one is installed."""
        return next((each for each in self.adapters.values() if issubclass(pipeline_class, each.pipelines)), None)

    def _check_name(self, kind: str, name: str) -> None:
        if rival := self._rivals.get((kind, name)):
            raise InvalidOptionError(
                f"{kind} {name!r} is in two packages, {self.origins[kind, name]} and {rival}; uninstall one of them"
            )
        if (kind, name) not in self.origins:
            error = unknown_name(kind, name, self.names(kind))
            for each in self.failures:
                error.add_note(f"plugin {each.plugin!r} of {each.package} was left out: {each.error}")
            raise error


def _package(entry_point: importlib.metadata.EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist else entry_point.value.split(".")[0]


def _as_installed(cls: Any) -> list[tuple[str, str, Any]]:
    """Return kind, name and class of what a policy's class installs; a memory is a stack too."""
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise InvalidOptionError(f"kvpack_register_policies registers classes of policies, got {cls!r}")
    policy = (cls.role, cls.name, cls)
    return [policy, ("stack", cls.name, cls)] if cls.role == "memory" else [policy]


def _call(what: str, factory: Callable[..., Any], options: dict[str, Any]) -> Any:
    known = list(inspect.signature(factory).parameters)
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {what}", option, known)
    try:
        return factory(**options)
    except TypeError as error:
        raise InvalidOptionError(f"{what}: {error}; options: {', '.join(known)}") from error


@cache
def registry() -> Registry:
    """Return what is installed in this interpreter, discovered once, at first use."""
    found = importlib.metadata.entry_points(group="kvpack")
    # Built-ins first, so that nobody takes their names; then in an order that does not depend on the file system.
    return Registry(sorted(found, key=lambda each: (_package(each) != "kvpack", _package(each), each.name)))
