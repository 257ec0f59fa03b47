"""A snapshot is whole: heads of all processes are gathered into it, and each process that reads it takes its own."""

import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from kvpack.errors import SnapshotError
from kvpack.memory.shard import Shard

#: Given a tensor and its axis of heads, returns it with others.
Change = Callable[[Tensor, int], Tensor]


def gathering(shard: Shard) -> Change:
    """Return what gathers a tensor's heads: into the host's memory of the first process, in others into nothing."""
    return lambda mine, axis: shard.gather(mine, axis).to("meta" if shard.rank else "cpu")


def field_with_heads(cls: type, name: str, value: Any, change: Change) -> Any:
    """Return a field's value with its tensors' heads changed, whose axis the field's type says.

    Raises:
        SnapshotError: if it holds a tensor whose axes nothing says.
    """
    try:
        hint = get_type_hints(cls).get(name)
    except (NameError, TypeError):  # a name that only type checkers import
        hint = None
    return _changed(value, hint, change, f"{name} of {cls.__name__}")


def _changed(value: Any, hint: Any, change: Change, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, Tensor):
        dims = [each.dim_str.split() for each in options if hasattr(each, "dim_str")]
        if not dims:
            raise SnapshotError(
                f"{where} does not say its axes, of which one may be that of heads; annotate it with jaxtyping, as in "
                'Float[Tensor, "batch tokens heads head_dim"]'
            )
        found = [each.index("heads") for each in dims if len(each) == value.ndim and "heads" in each]
        return change(value, found[0]) if found else value
    if isinstance(value, tuple) and _holds(value):
        (inner,) = [get_args(each) for each in options if get_origin(each) is tuple] or [()]
        hints = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is ... else list(inner)  # `tuple[T, ...]`
        pairs = zip(value, hints or [None] * len(value), strict=True)
        return tuple(_changed(each, one, change, where) for each, one in pairs)
    return value


def _holds(value: Any) -> bool:
    """Return whether a tensor is in a tuple, however deep."""
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(map(_holds, value)))
