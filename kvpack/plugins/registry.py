"""What is installed: policies, stacks and adapters, all found through the entry-point group `kvpack`."""

import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import pluggy

from kvpack.errors import InvalidOptionError, PluginWarning, UnusedOptionError, plain, require_int, unknown_name
from kvpack.generation.adapter import Adapter
from kvpack.memory.base import Memory
from kvpack.memory.policy import Policy, named
from kvpack.memory.stack import Stack
from kvpack.plugins import hookspecs

#: Options of every stack that archives blocks.
_STORAGE = ("store", "tier", "eviction")


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
        self.load(entry_points)

    def load(self, entry_points: Iterable[importlib.metadata.EntryPoint]) -> None:
        """Add what entry points name; a plugin that fails is left out, and one warning names it."""
        for entry_point in entry_points:
            try:
                self._load(entry_point)
            except (Exception, SystemExit) as error:  # whatever a plugin does, the others still load
                message = f"kvpack plugin {entry_point.name!r} ({entry_point.value}) was left out: {error!r}"
                self.failures.append(
                    Failure(entry_point.name, _package(entry_point), f"{type(error).__name__}: {error}")
                )
                warnings.warn(message, PluginWarning, stacklevel=3)

    def _load(self, entry_point: importlib.metadata.EntryPoint) -> None:
        plugin = entry_point.load()
        # A manager of its own, so that a plugin that fails halfway has registered nothing.
        manager = pluggy.PluginManager("kvpack")
        manager.add_hookspecs(hookspecs)
        manager.register(plugin, name=entry_point.name)
        manager.check_pending()
        package = _package(entry_point)
        found: list[tuple[str, str, Any]] = []  # nothing is installed before all of a plugin is known to be right
        manager.hook.kvpack_register_policies(register=lambda cls: found.append(_policy(cls)))
        manager.hook.kvpack_register_stacks(register=lambda name, factory: found.append(_stack(name, factory)))
        manager.hook.kvpack_register_adapters(register=lambda adapter: found.append(_adapter(adapter)))
        if not found and (unmarked := [each for each in dir(plugin) if each.startswith("kvpack_register_")]):
            raise InvalidOptionError(f"{package} registers nothing; mark {unmarked[0]} with @kvpack.hookimpl")
        # A memory is a stack by itself, unless its plugin has a factory of that name.
        stacks = {name for kind, name, _ in found if kind == "stack"}
        found += [("stack", name, cls) for kind, name, cls in found if kind == "memory" and name not in stacks]
        names = [(kind, name) for kind, name, _ in found]
        if twice := next((each for each in names if names.count(each) > 1), None):
            raise InvalidOptionError(f"{package} registers {twice[0]} {twice[1]!r} twice")
        taken = [(kind, name) for kind, name, _ in found if (kind, name) in self.origins]
        # A built-in keeps its name, whoever else wants it.
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

    def policy(self, role: str, policy: object, options: Mapping[str, Any] | None = None) -> Any:
        """Return a policy of `role` by name, with the options that it takes; an instance is returned as it is.

        Raises:
            UnknownNameError: if no policy of that name is installed.
            UnusedOptionError: if options are given with an instance.
            InvalidOptionError: if it is of another role, two packages want the name, or an option is unknown or wrong.
        """
        if not isinstance(policy, str):
            require_instance(role, policy)
            if options:
                has = f"{role} is an instance, which has options of its own, {policy!r}"
                raise UnusedOptionError(next(iter(options)), f"{has}; give the instance that option")
            return policy
        self._check_name(role, policy)
        made = _call(f"{role} {policy}", self.policies[role, policy], options or {})
        require_instance(role, made)
        return made

    def stack(self, name: str, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Memory:
        """Return a stack by name, with its options as keywords.

        Args:
            name: an installed one, which is then the stack's own name too.
            options: what was asked for; each has an effect, or is refused.
            defaults: options that hold where they have an effect beside those that were asked for.

        Raises:
            UnknownNameError: if no stack of that name is installed.
            InvalidOptionError: if two packages want the name, or an option is unknown or wrong.
        """
        self._check_name("stack", name)
        taken = inspect.signature(self.stacks[name]).parameters
        (offered, own), (options, storage) = (_apart(given, taken) for given in (defaults or {}, options))
        while True:  # each turn drops an offered option, of which there are a few
            try:
                made = _call(f"stack {name}", self.stacks[name], {**offered, **options}, beside=_STORAGE)
                break
            except UnusedOptionError as error:
                if error.option in options or error.option not in offered:
                    raise
                del offered[error.option]  # an option that nobody asked for must not be an error
        if made is None:
            raise InvalidOptionError(f"the factory of stack {name!r} returned None, but it must return a memory")
        require_instance("memory", made)
        if isinstance(made, Stack) and made.archives:
            if made.archive_blocks is None:
                own.pop("eviction", None)  # nothing leaves what keeps all
            storage = {**own, **storage}
        made = self._stored(made, storage)
        # A factory that changes a built-in stack is known by its own name in tables.
        return replace(made, name=name) if isinstance(made, Stack) and made.name != name else made

    def _stored(self, made: Memory, storage: Mapping[str, Any]) -> Memory:
        """Return a stack whose archive is kept as asked for."""
        if not storage:
            return made
        if not isinstance(made, Stack) or not made.archives:
            raise UnusedOptionError(next(iter(storage)), f"{made.name} archives no blocks; leave it out")
        if "eviction" in storage and made.archive_blocks is None:
            raise UnusedOptionError("eviction", f"{made.name} keeps all blocks; give archive_blocks= too")
        codec = self.policy("codec", storage.get("store", made.store))
        return replace(made, **{**storage, "store": codec})

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


def _policy(cls: Any) -> tuple[str, str, Any]:
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise InvalidOptionError(f"kvpack_register_policies registers classes of policies, got {cls!r}")
    return cls.role, named(cls), cls


def _stack(name: Any, factory: Any) -> tuple[str, str, Any]:
    if not (isinstance(name, str) and callable(factory)):
        raise InvalidOptionError(
            f"kvpack_register_stacks registers a name and a function that returns a memory, got {name!r}, {factory!r}"
        )
    return "stack", named(factory, name), factory


def _adapter(adapter: Any) -> tuple[str, str, Any]:
    if not isinstance(adapter, Adapter):
        raise InvalidOptionError(f"kvpack_register_adapters registers instances of Adapter, got {adapter!r}")
    return "adapter", named(adapter), adapter


def require_instance(role: str, given: object) -> None:
    """Raise `InvalidOptionError` if `given` is no policy of a role, or a memory that says no chunk length."""
    if isinstance(given, type) and issubclass(given, Policy):
        raise InvalidOptionError(f"{role} must be an instance, got the class {given.__name__}; give {given.__name__}()")
    if not isinstance(given, Policy):
        raise InvalidOptionError(f"{role} must be a name or an instance, got {given!r}")
    if not isinstance(given, Stack):  # whose name is the user's
        named(given)
    if given.role != role:
        hint = f"; give it to a stack, {given.role}={type(given).__name__}(...)" if role == "memory" else ""
        raise InvalidOptionError(f"{role} must be a {role}, but {type(given).__name__} is a {given.role}{hint}")
    if isinstance(given, Memory):
        if not hasattr(given, "chunk_frames"):
            raise InvalidOptionError(
                f"{type(given).__name__} has no chunk_frames, the latent frames generated together; add the field"
            )
        name = type(given).__name__
        require_int(f"chunk_frames of {name}", given.chunk_frames, minimum=1)
        for option, method in (("replay_frames", "forget"), ("max_retries", "veto")):
            if getattr(given, option) and getattr(type(given), method) is getattr(Memory, method):
                raise InvalidOptionError(f"{name} has {option}, so it must have {method}(); add the method")


def _apart(options: Mapping[str, Any], taken: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return options of a stack's own, some of which may be called so, and those of how its archive is kept."""
    storage = {name: options[name] for name in _STORAGE if name in options and name not in taken}
    return {name: value for name, value in options.items() if name not in storage}, storage


def _call(what: str, factory: Callable[..., Any], options: Mapping[str, Any], beside: Iterable[str] = ()) -> Any:
    known = list(inspect.signature(factory).parameters)
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {what}", option, [*known, *beside], "Options")
    try:
        return factory(**{name: plain(option) for name, option in options.items()})
    except InvalidOptionError:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidOptionError(f"{what}: {error}; options: {', '.join(known)}") from error
    except Exception as error:
        error.add_note(f"raised while {what} was made")
        raise


def package_version(package: str) -> str:
    """Return the version of an installed package, or an empty text for a mere module."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


_LOCK = RLock()
_FOUND: list[Registry] = []  # one, from its first use on


def registry() -> Registry:
    """Return what is installed in this interpreter, discovered once, at first use."""
    with _LOCK:
        if not _FOUND:
            # There while it is filled: a plugin that asks for names while it is loaded meets the built-ins.
            _FOUND.append(Registry([]))
            found = importlib.metadata.entry_points(group="kvpack")
            # Built-ins first, so that nobody takes their names; then in an order that no file system changes.
            _FOUND[0].load(sorted(found, key=lambda each: (_package(each) != "kvpack", _package(each), each.name)))
    return _FOUND[0]
