"""The three hooks of a plugin, called once at discovery. See docs/extend/plugin.md."""

from collections.abc import Callable

import pluggy

from kvpack.generation.adapter import Adapter
from kvpack.memory.base import Memory
from kvpack.memory.policy import Policy

hookspec = pluggy.HookspecMarker("kvpack")
hookimpl = pluggy.HookimplMarker("kvpack")


@hookspec
def kvpack_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Call `register(PolicyClass)` for every policy, memories among them; its role and name are class attributes."""


@hookspec
def kvpack_register_stacks(register: Callable[[str, Callable[..., Memory]], None]) -> None:
    """Call `register("vendor-name", factory)`; the factory's keywords are the stack's options.

    A `Stack` that it returns has that name in tables, whatever it was made of. A memory that is registered as a policy
    is a stack already; a factory of the same name takes its place.
    """


@hookspec
def kvpack_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Call `register(adapter)` for every model family."""
