"""Trees read back: nothing is made but plain data, tensors, and dataclasses of a list that the reader has."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, get_args

import torch
from torch import Tensor

from kvpack.errors import SnapshotError
from kvpack.memory.archive import Archive, Encoded
from kvpack.memory.codec import Codec, Tier
from kvpack.memory.policy import Policy
from kvpack.memory.store import StoredBlock
from kvpack.snapshots.heads import Change, field_with_heads
from kvpack.snapshots.types import fits
from kvpack.snapshots.writing import KIND, Node

_DTYPES = {str(each).removeprefix("torch."): each for each in vars(torch).values() if isinstance(each, torch.dtype)}


#: Given a file that the snapshot lists and a name, reads a tensor of its own memory, on the CPU.
Tensors = Callable[[str, str], Tensor]


class TreeReader:
    """Reads what `TreeWriter` wrote; the same tensor, block or generator twice is one again.

    Args:
        classes: frozen dataclasses that may be part of a tree, by name.
        policies: those of the stack by role.
        device: where the model runs.
        tensors: reads tensors.
        tier: where archives go; None is where they were.
        heads: takes this process's heads; None where it has all.
    """

    def __init__(
        self,
        classes: Mapping[str, type],
        policies: Mapping[str, Policy],
        device: torch.device,
        tensors: Tensors,
        tier: Tier | None = None,
        heads: Change | None = None,
    ) -> None:
        self._classes, self._policies, self._device, self._read = classes, policies, device, tensors
        self._tier: Tier | None = tier
        self._heads = heads
        self._tensors: dict[tuple[str, str, bool], Tensor] = {}
        self._made: dict[tuple[str, int], Any] = {}

    def value(self, node: Node) -> Any:
        """Return a tree.

        Raises:
            SnapshotError: if it is not what a writer writes.
        """
        if node is None or isinstance(node, bool | str | int | float):
            return node
        if isinstance(node, list):  # a tuple: a list has a kind of its own
            return tuple(self.value(each) for each in node)
        kind = node.get(KIND) if isinstance(node, dict) else None
        read = _READERS.get(str(kind))
        if read is None:
            raise SnapshotError(f"it holds {str(kind)[:40]!r}, which no snapshot of this version has")
        with explained(f"a {kind} in it is not as a snapshot has it", SnapshotError):
            return read(self, node)

    def _tensor(self, node: dict[str, Any]) -> Tensor:
        key = _text(node["file"]), _text(node["name"]), bool(node["here"])
        if key not in self._tensors:
            tensor = self._read(*key[:2])
            self._tensors[key] = tensor.to(self._device) if key[2] else tensor
        return self._tensors[key]

    def _own(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor if self._heads is None else self._heads(tensor, axis)

    def _once(self, kind: str, first: Tensor, make: Callable[[], Any]) -> Any:
        """Return the one thing that is made of a tensor."""
        key = kind, id(first)  # the tensor is kept, so that its id stays its own
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _block(self, node: dict[str, Any]) -> StoredBlock:
        keys, values = self._tensor(node["keys"]), self._tensor(node["values"])
        if keys.ndim != 4 or keys.shape != values.shape or keys.dtype != values.dtype:
            raise SnapshotError(f"a block has keys {tuple(keys.shape)} and values {tuple(values.shape)}")
        return self._once("block", keys, lambda: StoredBlock(keys.shape[1], (self._own(keys, 2), self._own(values, 2))))

    def _generator(self, node: dict[str, Any]) -> torch.Generator:
        state = self._tensor({**node["state"], "here": False})  # a generator takes its state from the host

        def make() -> torch.Generator:
            try:
                generator = torch.Generator(_text(node["device"]))
            except RuntimeError as error:
                raise SnapshotError(f"its noise is drawn on {node['device']!r}, which is not here") from error
            return generator.set_state(state)

        return self._once("generator", state, make)

    def _archive(self, node: dict[str, Any]) -> Archive:
        codec, tier = self.value(node["codec"]), node["tier"]
        if not isinstance(codec, Codec) or tier not in get_args(Tier):
            raise SnapshotError(f"an archive is in the form {codec!r}, on the tier {str(tier)[:40]!r}")
        archive = Archive(_count(node["slot_tokens"]), codec, self._tier or tier)
        slots = 1 + max((_count(slot) for slot, _ in node["held"]), default=-1)
        if slots > 2 * len(node["held"]) + 2:  # a slot's number alone would make room for as many
            raise SnapshotError(f"an archive of {slots} slots has {len(node['held'])} blocks")
        for slot, (keys, values, sums, places) in node["held"]:
            own = None if places is None else self._tensor(places)
            if own is not None and own.ndim == 4:
                own = self._own(own, 2)
            read = [[self._tensor(each) for each in stored] for stored in (keys, values)]
            # Of what a codec stores by head, heads are the last axis but one.
            stored = [tuple(self._own(each, each.ndim - 2) for each in form) for form in read]
            block = Encoded(stored[0], stored[1], self._own(self._tensor(sums), 1), own)
            archive.restore(slot, slots, _DTYPES[node["dtype"]], block)
        return archive

    def _data(self, node: dict[str, Any]) -> Any:
        cls = self._classes.get(_text(node["class"]))
        if cls is None:
            raise SnapshotError(f"it holds a {node['class'][:80]!r}, which is nothing that this stack or model keeps")
        known, given = {each.name for each in fields(cls)}, set(node["fields"])
        if known != given:  # of another version, fields may mean something else
            raise SnapshotError(f"a {cls.__name__} in it has {sorted(given)[:20]}, but here it has {sorted(known)}")
        values = {name: self.value(each) for name, each in node["fields"].items()}
        for name, hint in fits(cls, values):
            raise SnapshotError(
                f"{name} of a {cls.__name__} in it is {type(values[name]).__name__}, but must be {hint}"
            )
        if self._heads is not None:
            values = {name: field_with_heads(cls, name, value, self._heads) for name, value in values.items()}
        return cls(**values)


@contextmanager
def explained(said: str, through: type[Exception]) -> Iterator[None]:
    """Turn what a tree of the wrong shape makes Python raise into a `SnapshotError`, but for errors that go through."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ArithmeticError) as error:
        if isinstance(error, through | torch.OutOfMemoryError):  # the latter says nothing of the snapshot
            raise
        what = " ".join(str(error).split())[:300]  # torch writes several lines
        raise SnapshotError(f"{said} ({type(error).__name__}: {what})") from error


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:  # True is an int in Python
        raise SnapshotError(f"it counts {str(value)[:40]!r} of something")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise SnapshotError(f"it has {str(value)[:40]!r} in the place of a name")
    return value


# Not of the object, as in `writing`.
_READERS: dict[str, Callable[[TreeReader, dict[str, Any]], Any]] = {
    "float": lambda _, node: float(_text(node["is"])),
    "list": lambda self, node: [self.value(each) for each in node["of"]],
    "dict": lambda self, node: {self.value(key): self.value(each) for key, each in node["of"]},
    "tensor": TreeReader._tensor,
    "array": lambda self, node: self._tensor(node["of"]).cpu().numpy(),
    "block": TreeReader._block,
    "archive": TreeReader._archive,
    "policy": lambda self, node: self._policies[node["role"]],
    "generator": TreeReader._generator,
    "dtype": lambda _, node: _DTYPES[node["name"]],
    "device": lambda self, node: self._device if node["here"] else torch.device("cpu"),
    "data": TreeReader._data,
}
