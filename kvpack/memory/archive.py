"""Compressed blocks of a layer, in slots, attended or not."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Mark:
    """What a slot was last written with; another one for each block."""

    __slots__ = ("__weakref__",)


class Archive:
    """Compressed blocks of one layer in equal slots: keys before RoPE, values, and the sum of each block's keys.

    Args:
        slot_tokens: most tokens of a block.
    """

    def __init__(self, slot_tokens: int) -> None:
        self.slot_tokens = slot_tokens
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        self.key_sums = torch.empty(0)
        #: Where tokens sit, if that differs by row or layer.
        self.coordinates: Tensor | None = None
        #: Of each slot that was ever written.
        self.marks: dict[int, Mark] = {}
        self._shared = False

    @property
    def slots(self) -> int:
        """Slots allocated."""
        return self.keys.shape[1] if self.keys.ndim == 5 else 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare slots included."""
        placed = 0 if self.coordinates is None else self.coordinates.nbytes
        return self.keys.nbytes + self.values.nbytes + self.key_sums.nbytes + placed

    def write(
        self,
        slot: int,
        keys: Float[Tensor, "rows tokens heads head_dim"],
        values: Float[Tensor, "rows tokens heads head_dim"],
        coordinates: Tensor | None = None,
    ) -> None:
        """Put a block into a free slot.

        Args:
            slot: index of the slot, for which there is room after `reserve`.
            keys: keys before RoPE.
            values: values.
            coordinates: (t, y, x) of each token, `[rows, tokens, 3]` or `[rows, tokens, heads, 3]`, if they depend on
                the data.
        """
        tokens = keys.shape[1]
        self.marks[slot] = Mark()
        self.keys[:, slot, :tokens] = keys
        self.values[:, slot, :tokens] = values
        self.key_sums[:, slot] = keys.float().sum(dim=1)
        if coordinates is not None:
            assert self.coordinates is not None
            self.coordinates[:, slot, :tokens] = coordinates

    def reserve(
        self, slot: int, like: Float[Tensor, "rows tokens heads head_dim"], coordinates: Tensor | None = None
    ) -> None:
        """Make room for a block in a slot; what the archive holds stays as it is.

        Whatever may fail for want of memory is done here, before a commit begins to write.

        Args:
            slot: index of the slot.
            like: the block's keys.
            coordinates: its places, if they depend on the data.
        """
        if self._shared:
            self._own()
        rows, _, heads, head_dim = like.shape
        slots = grown_slots(self.slots, slot)
        held = 0 if self.coordinates is None else self.coordinates.shape[1]
        if coordinates is not None and held < slots:
            shape = (coordinates.shape[0], slots - held, self.slot_tokens, *coordinates.shape[2:])
            new = coordinates.new_zeros(shape, dtype=torch.float32)
            self.coordinates = new if self.coordinates is None else torch.cat([self.coordinates, new], dim=1)
        if more := slots - self.slots:
            shape = (rows, more, self.slot_tokens, heads, head_dim)
            sums = torch.zeros(rows, more, heads, head_dim, dtype=torch.float32, device=like.device)
            self.key_sums = _extended(self.key_sums, sums)
            self.values = _extended(self.values, like.new_zeros(shape))
            # Last, since `slots` goes by it: an interrupt before it leaves room that is made again.
            self.keys = _extended(self.keys, like.new_zeros(shape))

    def gather(
        self, rows: slice, slots: Int[Tensor, "some chosen"], tokens: int
    ) -> tuple[Float[Tensor, "some all heads head_dim"], Float[Tensor, "some all heads head_dim"]]:
        """Return keys and values of the chosen slots, the first `tokens` of each, joined; each row has its choice."""
        index = torch.arange(slots.shape[0], device=slots.device)[:, None]
        return (
            self.keys[rows, :, :tokens][index, slots].flatten(1, 2),
            self.values[rows, :, :tokens][index, slots].flatten(1, 2),
        )

    def fork(self) -> "Archive":
        """Return an independent archive that shares all memory with this one until either is written."""
        copy = Archive(self.slot_tokens)
        copy.keys, copy.values, copy.key_sums, copy.coordinates = (
            self.keys,
            self.values,
            self.key_sums,
            self.coordinates,
        )
        copy.marks = dict(self.marks)
        self._shared = copy._shared = True
        return copy

    def _own(self) -> None:
        self.keys, self.values, self.key_sums = self.keys.clone(), self.values.clone(), self.key_sums.clone()
        self.coordinates = None if self.coordinates is None else self.coordinates.clone()
        self._shared = False


def grown_slots(slots: int, slot: int) -> int:
    """Return how many slots an archive of `slots` has once a block is in `slot`.

    Spare slots are bytes that nobody asked for, but to grow copies the archive.

    >>> grown_slots(0, 0), grown_slots(4, 3), grown_slots(320, 320)
    (1, 4, 330)
    """
    return slots if slot < slots else max(slot + 1, slots + slots // 32)


def _extended(old: Tensor, more: Tensor) -> Tensor:
    """Return `old` with the slots of `more` behind its own."""
    return torch.cat([old, more], dim=1) if old.ndim == more.ndim else more
