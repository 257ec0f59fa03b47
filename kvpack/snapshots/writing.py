"""Trees of plain data, frozen dataclasses and tensors, written as JSON and a list of tensors."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from kvpack.errors import SnapshotError
from kvpack.memory.archive import Archive
from kvpack.memory.policy import Policy
from kvpack.memory.store import StoredBlock
from kvpack.snapshots.heads import Change, field_with_heads

#: The key that tells what a JSON object stands for; plain dicts are written as lists of pairs.
KIND = "!"
#: What JSON takes.
Node = Any


#: Of each immutable thing that is in files already: how it is written, and the files with the bytes of it in each.
Written = WeakKeyDictionary[Any, tuple[Node, dict[str, int]]]


class TreeWriter:
    """Writes trees, the tensors of all of them into one file.

    Args:
        classes: frozen dataclasses that may be part of a tree, by name.
        policies: those of the stack by role, which are named and not written.
        device: where the model runs.
        files: names of two files: for new blocks, which never change, and for all other tensors.
        written: what is in files already; what is used of it or new is in `kept` afterwards.
        heads: gathers the heads of other processes; None where this one has all.
    """

    def __init__(
        self,
        classes: Mapping[str, type],
        policies: Mapping[str, Policy],
        device: torch.device,
        files: tuple[str, str],
        written: Written | None = None,
        heads: Change | None = None,
    ) -> None:
        self._names = {cls: name for name, cls in classes.items()}
        self._policies, self._device = policies, device
        self._blocks, self._file = files
        self._written: Written = WeakKeyDictionary() if written is None else written
        self.kept: Written = WeakKeyDictionary()
        self._heads = heads
        #: New tensors of each file by name, and the bytes that are referred to in each.
        self.tensors: dict[str, dict[str, Tensor]] = {file: {} for file in files}
        self.used: dict[str, int] = {}
        self._seen: dict[int, tuple[object, Node]] = {}

    def node(self, value: object, where: str = "") -> Node:
        """Return a tree as JSON takes it.

        Raises:
            SnapshotError: if something in it is no data.
        """
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):  # behind bool, which is one
            return int(value)  # plain: of an enumeration no name is written
        if isinstance(value, float):
            # JSON has neither NaN nor infinity.
            return float(value) if math.isfinite(value) else {KIND: "float", "is": str(float(value))}
        if id(value) not in self._seen:
            # The value is kept alive, so that its id stays its own.
            self._seen[id(value)] = value, self._compound(value, where)
        return self._seen[id(value)][1]

    def _compound(self, value: Any, where: str) -> Node:
        if type(value) is tuple:  # not one with names, which would come back without them
            return [self.node(each, f"{where}[{index}]") for index, each in enumerate(value)]
        if isinstance(value, list):
            return {KIND: "list", "of": [self.node(each, f"{where}[{index}]") for index, each in enumerate(value)]}
        if isinstance(value, Mapping):  # pairs, since keys need not be texts, and one may be `KIND`
            pairs = [[self.node(key, where), self.node(each, f"{where}.{key}")] for key, each in value.items()]
            return {KIND: "dict", "of": pairs}
        for kind, write in _WRITERS.items():
            if isinstance(value, kind):
                return write(self, value, where)
        if type(value) in self._names:  # exactly: a subclass has fields that the reader does not know
            content = {
                each.name: self.node(self._field(value, each.name, where), f"{where}.{each.name}")
                for each in fields(value)
            }
            return {KIND: "data", "class": self._names[type(value)], "fields": content}
        raise SnapshotError(f"{where.lstrip('.')} is a {type(value).__name__}, which is no data to save")

    def _field(self, value: Any, name: str, where: str) -> Any:
        held = getattr(value, name)
        if self._heads is None or not where.startswith("pasts"):
            return held
        return field_with_heads(type(value), name, held, self._heads)

    def _tensor(self, tensor: Tensor, axis: int | None = None) -> Node:
        name = f"t{len(self.tensors[self._file])}"  # unique in its file
        # Not which device, but whether it is the model's: that may be another when it is resumed.
        here = tensor.device.type == self._device.type
        if self._heads is not None and axis is not None:
            tensor = self._heads(tensor, axis)
        self.tensors[self._file][name] = tensor  # no copy: it is read when the file is written
        self._use({self._file: tensor.nbytes})
        return {KIND: "tensor", "file": self._file, "name": name, "here": here}

    def _block(self, block: StoredBlock) -> Node:
        return {KIND: "block", "keys": self._tensor(block.keys, 2), "values": self._tensor(block.values, 2)}

    def _archive(self, archive: Archive) -> Node:
        archive.settle()  # the host reads slots that may still be on their way
        held = [[slot, self._once(mark, partial(self._slot, archive, slot))] for slot, mark in archive.marks.items()]
        return {
            KIND: "archive",
            "slot_tokens": archive.slot_tokens,
            "codec": self.node(archive.codec, "archive"),
            "tier": archive.tier,
            "dtype": str(archive.dtype).removeprefix("torch."),
            "held": held,
        }

    def _slot(self, archive: Archive, slot: int) -> Node:
        places = archive.coordinates
        placed = places is not None and slot < places.shape[1]
        # The last axis but one of all that a codec stores by head is that of heads; a slot has one axis less.
        keys, values = (
            [self._tensor(each[:, slot], each.ndim - 3) for each in stored] for stored in (archive.keys, archive.values)
        )
        own = None
        if placed and places is not None:
            own = self._tensor(places[:, slot], 2 if places.ndim == 5 else None)  # places by head
        return [keys, values, self._tensor(archive.key_sums[:, slot], 1), own]

    def _policy(self, policy: Policy, where: str) -> Node:
        for role, own in self._policies.items():
            if own == policy:  # equal is enough: policies are values
                return {KIND: "policy", "role": role}
        raise SnapshotError(f"{where.lstrip('.')} is the policy {policy.name}, which is none of the stack's")

    def _once(self, thing: Any, write: Callable[[], Node]) -> Node:
        """Return what is written of something immutable, from an earlier file if it is there."""
        known = self._written.get(thing)
        if known is None:
            file, self._file = self._file, self._blocks  # in the file that later snapshots share
            before = self.used.get(self._file, 0)
            known = write(), {self._file: self.used.get(self._file, 0) - before}
            self._file = file
        else:
            self._use(known[1])  # counted all the same: `Saver` rewrites files of which little is used
        self.kept[thing] = known
        return known[0]

    def _use(self, files: Mapping[str, int]) -> None:
        for file, count in files.items():
            self.used[file] = self.used.get(file, 0) + count


# Not of the object: one that knew its own methods would be a circle, and hold all tensors until Python looks for those.
_WRITERS: dict[type, Callable[[TreeWriter, Any, str], Node]] = {
    Tensor: lambda self, value, _: self._tensor(value),
    StoredBlock: lambda self, value, _: self._once(value, lambda: self._block(value)),
    Archive: lambda self, value, _: self._archive(value),
    Policy: TreeWriter._policy,
    torch.Generator: lambda self, value, _: {
        KIND: "generator",
        "device": value.device.type,
        "state": self._tensor(value.get_state()),
    },
    torch.dtype: lambda _, value, __: {KIND: "dtype", "name": str(value).removeprefix("torch.")},
    torch.device: lambda self, value, _: {KIND: "device", "here": value.type == self._device.type},
    np.ndarray: lambda self, value, _: {KIND: "array", "of": self._tensor(torch.from_numpy(value))},
}
