"""What a file of `torch.save` would make of memory, read off its pickle without unpickling anything.

`torch.load(weights_only=True)` runs no code of the file, but takes its word for sizes: it calls `bytearray(n)` and
`torch.Tensor(n)`, and inflates what is compressed.
"""

import mmap
import pickletools
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from kvpack.checkpoints.archive import archived_pickle, is_archive
from kvpack.errors import InvalidOptionError

#: What the pickles of weights call. Of the rest torch refuses all but what makes memory of a number.
_CALLED = {
    "collections OrderedDict",
    "collections Counter",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
    "torch.serialization _get_layout",
    "torch Size",
    "torch device",
    "_codecs encode",
    "__builtin__ set",
    "builtins set",
    "builtins complex",
}
_TENSORS = {"torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"}
_BYTES = {"DoubleStorage": 8, "LongStorage": 8, "FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2, "ShortStorage": 2}
_BYTES |= {"BFloat16Storage": 2, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16}
#: Bytes of a pickle without tensors; Python's objects take sixty times what one byte of it may stand for.
_MOST = 1 << 18
#: Tuples around an item, of which torch.save writes three; and items of tuples that are counted anew each time.
_LEVELS, _FEW = 8, 32
_MARK = object()
#: What a function of torch returned.
_TENSOR = object()
#: What a tensor with attributes of Python is made by, and what it may be.
_ATTRIBUTED, _TYPES = "torch._tensor _rebuild_from_type_v2", {"torch Tensor", "torch.nn.parameter Parameter"}


class _Name(str):
    """What a function or class is named by."""


class _Tuple(tuple[Any, ...]):
    """A tuple of many items, that knows how many items it has with theirs, each as often as it is there."""

    items: int


@dataclass(slots=True)
class _Items:
    """A container, or what is made of one; a call may copy as many items as it has."""

    count: int = 0


def require_modest(path: Path) -> None:
    """Raise `InvalidOptionError` if a file of `torch.save` asks for more memory than its own size.

    A pickle that is broken is let through, for `torch.load` says what is wrong.
    """
    size = path.stat().st_size
    if size == 0:
        return
    most = _MOST + size // 32
    with open(path, "rb") as file, closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as mapped:
        # A file of old torch begins with five pickles.
        sources = [BytesIO(archived_pickle(path, most))] if is_archive(path) else [mapped] * 5
        claimed = sum(_claimed(path, source, most) for source in sources)
    if claimed > size:
        raise InvalidOptionError(f"{path} has {size} bytes, but announces storages of {claimed}; it is no checkpoint")


def _claimed(path: Path, source: Any, most: int) -> int:
    """Return the bytes of all storages that a pickle names, and refuse one that calls what makes memory of a number."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    storages: dict[Any, int] = {}
    begun, copied, nested, wrong = source.tell(), 0, 0, None
    with suppress(ValueError, IndexError, KeyError):  # broken, as torch will say when it comes there
        for code, argument, place in pickletools.genops(source):
            asked = stack[-1] if stack else None
            if place is not None and place - begun > most:  # no further: each opcode takes time
                break
            if wrong := _step(code, argument, stack, memo, storages):
                break
            if (copied := copied + _copied(code.name, asked)) > most:
                wrong = f"copies more than {most} bytes or items of itself; it is no checkpoint"
                break
            nested += _items(stack[-1]) if code.name.startswith("TUPLE") else 0
            if nested > _LEVELS * most:  # hashed as a key, one tuple twice in one, and so on, takes for ever
                wrong = f"has tuples in tuples of more than {_LEVELS * most} items; it is no checkpoint"
                break
    if wrong is None and source.tell() - begun > most:
        wrong = f"has more than {most} bytes beside its tensors; it is no checkpoint"
    if wrong is not None:
        raise InvalidOptionError(f"{path} {wrong}")
    return sum(storages.values())


def _step(code: Any, argument: Any, stack: list[Any], memo: dict[Any, Any], storages: dict[Any, int]) -> str | None:
    """Do to a stack of names, numbers and tuples what an opcode does to the unpickler's; return what is wrong with it.

    A storage is the `_Storage` of its count of numbers.
    """
    name = code.name
    if name in ("REDUCE", "NEWOBJ") and (wrong := _harm(stack[-2], stack[-1])):
        return wrong
    if name == "BUILD" and stack[-2] is _TENSOR:
        return "sets a tensor anew, which torch.save never does"
    if name == "BINPERSID":
        if isinstance(stack[-1], tuple) and any(isinstance(each, tuple) for each in stack[-1][:5]):
            return "names a storage as torch.save never does"
        argument = _storage(stack[-1], storages)
    if name.endswith("PUT"):
        memo[argument] = stack[-1]
    elif name.endswith("GET"):
        stack.append(memo[argument])
    elif name == "MARK":
        stack.append(_MARK)
    elif pickletools.markobject in code.stack_before:
        _cut(stack, name)
    else:
        count = len(code.stack_before)
        taken = stack[len(stack) - count :] if count else []
        del stack[len(stack) - count :]
        if name in ("APPEND", "SETITEM"):
            _grow(taken[0], 1)
        kept = taken[:1] if name in ("APPEND", "SETITEM", "BUILD") else [_made(name, argument, taken)]
        stack += kept[: len(code.stack_after)]
    return None


def _made(name: str, argument: Any, taken: list[Any]) -> Any:
    """Return what stands for what an opcode puts on the stack."""
    if name in ("REDUCE", "NEWOBJ"):
        return _TENSOR if _called(taken[0]).startswith("torch") else _Items(_size(taken[1]))
    if name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
        return _Items()
    return _tuple(taken) if "TUPLE" in name else _Name(argument) if name == "GLOBAL" else argument


def _tuple(items: Iterable[Any]) -> tuple[Any, ...]:
    plain = tuple(items)
    count = _items(plain)
    if count < _FEW:  # quickly counted again, and half as large
        return plain
    made = _Tuple(plain)
    made.items = count
    return made


def _items(given: Any) -> int:
    if isinstance(given, _Tuple):
        return given.items
    return len(given) + sum(map(_items, given)) if isinstance(given, tuple) else 0


def _called(called: Any) -> str:
    return called if isinstance(called, _Name) else ""


def _copied(name: str, given: Any) -> int:
    """Return how much an opcode may copy of what it is given: that may be one object again and again."""
    if name == "BUILD":
        return _size((given,))
    return _size(given) if name in ("REDUCE", "NEWOBJ") else 0


def _size(given: Any, inner: bool = True) -> int:
    """Return the letters and items in the arguments of a call, and in arguments that are tuples themselves."""
    if not isinstance(given, tuple):
        return 0
    counts = (each.count if isinstance(each, _Items) else len(each) if _long(each) else 0 for each in given)
    return len(given) + sum(counts) + sum(_size(each, False) for each in given if inner)


def _long(given: Any) -> bool:
    return isinstance(given, str | bytes) and not isinstance(given, _Name)


def _grow(container: Any, by: int) -> None:
    if isinstance(container, _Items):
        container.count += by


def _cut(stack: list[Any], name: str) -> None:
    """Take all behind the last mark off a stack, and put a tuple of it there, if that is what the opcode does."""
    at = len(stack) - 1 - stack[::-1].index(_MARK)
    items = stack[at + 1 :]
    del stack[at:]
    if name == "TUPLE":
        stack.append(_tuple(items))
    elif name in ("LIST", "DICT", "FROZENSET"):
        stack.append(_Items(len(items)))
    elif stack:  # they are put into what is in front of the mark
        _grow(stack[-1], len(items))


def _harm(called: Any, given: Any) -> str | None:
    """Return what is wrong with a call, if it may make memory of nothing but a number."""
    name = _called(called)
    if name in _TENSORS:
        return None if _fits(given) else "has a tensor that is larger than its storage; it is no checkpoint"
    if name == _ATTRIBUTED and isinstance(given, tuple) and len(given) == 4:
        function, kind, arguments, _ = given  # a plain tensor, which is then given attributes
        if _called(function) in _TENSORS and _called(kind) in _TYPES:
            return _harm(function, arguments)
    plain = name != "_codecs encode" or (
        isinstance(given, tuple) and given[1:] == ("latin1",) and type(given[0]) is str
    )
    if (name in _CALLED and plain) or not (name.startswith(("torch", "_codecs")) or name.endswith("bytearray")):
        return None
    return f"holds more than tensors: it calls {name.replace(' ', '.')}; save its state dict alone"


def _fits(given: Any) -> bool:
    """Whether a tensor `(storage, offset, sizes, strides, ...)` is within its storage."""
    if not isinstance(given, tuple) or len(given) < 4 or not isinstance(given[0], _Storage):
        return False
    storage, offset, sizes, strides, *_ = given
    if not (isinstance(sizes, tuple) and isinstance(strides, tuple) and len(sizes) == len(strides)):
        return False
    if not all(isinstance(each, int) and each >= 0 for each in (offset, *sizes, *strides)):
        return False
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return bool(0 in sizes or offset + last < storage.count)


@dataclass(frozen=True)
class _Storage:
    count: int


def _storage(identity: Any, storages: dict[Any, int]) -> _Storage | None:
    """Return a storage `("storage", type, key, device, count, ...)`, and note the bytes that it would take."""
    if not isinstance(identity, tuple) or len(identity) < 5 or not isinstance(identity[4], int):
        return None
    kind, key, count = str(identity[1]).rpartition(" ")[2], str(identity[2]), identity[4]
    storages[key] = max(storages.get(key, 0), count * _BYTES.get(kind, 1))
    return _Storage(count)
