"""Which classes a snapshot may hold, and whether values are what their fields say."""

import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kvpack.generation.adapter import Adapter
from kvpack.generation.replay import CleanFrames
from kvpack.memory.base import Memory
from kvpack.memory.blocks import KVBlock, Span
from kvpack.memory.divided import Divided, DividedBook
from kvpack.memory.geometry import Geometry
from kvpack.memory.ledger import BlockEntry, Ledger
from kvpack.memory.plan import Book
from kvpack.memory.policy import Policy
from kvpack.memory.session import Past
from kvpack.memory.stack import ROLES, Stack
from kvpack.memory.stack_plan import StackBook
from kvpack.memory.stack_state import KeptBlock, StackState
from kvpack.memory.tokens import Tokens
from kvpack.plugins.registry import registry

_BOOKS = (Past, Book, StackBook, DividedBook, Ledger, BlockEntry)
_CORE = (*_BOOKS, StackState, KeptBlock, KVBlock, Span, Tokens, CleanFrames, Geometry)


def allowed_classes(stack: Memory, adapter: Adapter) -> dict[str, type]:
    """Return by name the frozen dataclasses that a generation's memory and run may hold.

    They are the core's, and those that the modules of the installed policies, of this stack and of this adapter know;
    policies themselves are never made.
    """
    sources = [*registry().policies.values(), type(stack), *map(type, policies_of(stack).values())]
    sources += [each for cls in (type(adapter), adapter.run_class) for each in cls.__mro__]
    modules = dict.fromkeys(cls.__module__ for cls in sources)
    found = [each for name in modules if name in sys.modules for each in vars(sys.modules[name]).values()]
    return {f"{cls.__module__}.{cls.__qualname__}": cls for cls in (*_CORE, *found) if _is_data(cls)}


def policies_of(stack: Memory) -> dict[str, Policy]:
    """Return the policies of a stack by role, of a divided memory those of all its stacks, or the memory itself."""
    if isinstance(stack, Divided):
        each = enumerate(map(policies_of, stack.stacks))
        numbered = {f"{role} {index}": policy for index, roles in each for role, policy in roles.items()}
        return {"memory": stack, **numbered, "codec": stack.stacks[0].store}
    if not isinstance(stack, Stack):
        return {"memory": stack}
    return {**{role: getattr(stack, role) for role in ROLES}, "codec": stack.store}


def _is_data(cls: Any) -> bool:
    frozen = isinstance(cls, type) and is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return frozen and not issubclass(cls, Policy)  # they come from the pipeline, never from a file


def fits(annotated: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and type of each field or argument that a value does not fit, as far as it can be looked at."""
    try:
        hints = get_type_hints(annotated)
    except (NameError, TypeError):  # a name that only type checkers import
        hints = {}
    for name, value in values.items():
        if name in hints and not is_a(value, hints[name]):
            yield name, hints[name]


def is_a(value: Any, hint: Any) -> bool:
    """Return whether a value is of a type, as far as that can be looked at."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(is_a(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is ...:
            return all(is_a(each, arguments[0]) for each in value)
        return len(value) == len(arguments) and all(map(is_a, value, arguments))
    if origin is dict:
        return isinstance(value, dict) and all(
            is_a(key, arguments[0]) and is_a(each, arguments[1]) for key, each in value.items()
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)  # True is an int in Python
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    wanted = origin or hint
    return isinstance(value, wanted) if isinstance(wanted, type) else True
