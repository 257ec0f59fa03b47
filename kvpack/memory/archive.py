"""Compressed blocks of a layer, in slots, attended or not."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvpack.memory.attribution import name_policy
from kvpack.memory.codec import DENSE, Codec, Form, Half, Stored, Tier, form, lengthened, room
from kvpack.memory.fetching import fetched, in_order, selecting
from kvpack.memory.prefetch import Prefetch, overlaps
from kvpack.memory.tokens import Later

#: Most blocks that are decoded together: at 832x480, 9 MB of keys in bfloat16.
AT_ONCE = 16


class Mark:
    """What a slot was last written with; another one for each block."""

    __slots__ = ("__weakref__",)  # snapshots look up by it what is in a file already


@dataclass(frozen=True, eq=False)
class Encoded:
    """A block as a slot holds it.

    Args:
        keys: what the codec makes of keys before RoPE.
        values: what it makes of values.
        key_sums: sum of the keys.
        coordinates: (t, y, x) of each token, `[rows, tokens, 3]` or `[rows, tokens, heads, 3]`, if they depend on the
            data.
    """

    keys: Stored
    values: Stored
    key_sums: Float[Tensor, "rows heads head_dim"]
    coordinates: Tensor | None = None


class Archive:
    """Compressed blocks of one layer in equal slots: keys before RoPE and values in a codec's form, and sums of keys.

    Args:
        slot_tokens: most tokens of a block.
        codec: in what form keys and values are stored.
        tier: where they are stored; sums of keys and places are beside the model.
    """

    def __init__(self, slot_tokens: int, codec: Codec = DENSE, tier: Tier = "device") -> None:
        self.slot_tokens, self.codec = slot_tokens, codec
        self.tier: Tier = tier
        #: What the codec makes of keys, and of values, `[rows, slots, ...]`.
        self.keys: Stored = ()
        self.values: Stored = ()
        self.key_sums = torch.empty(0)
        #: Where tokens sit, if that differs by row or layer.
        self.coordinates: Tensor | None = None
        #: Of each slot that was ever written.
        self.marks: dict[int, Mark] = {}
        #: Of keys and values once they are decoded.
        self.dtype = torch.float32
        self._shared = False  # with a fork: whoever writes first takes a copy
        #: Of the last write to host memory, which nobody has waited for.
        self._written: torch.cuda.Event | None = None

    @property
    def decodes_later(self) -> bool:
        """Whether keys of chosen blocks are decoded in every forward; from elsewhere they come once a chunk."""
        return self.codec != DENSE and self.tier == "device"

    @property
    def slots(self) -> int:
        """Slots allocated."""
        return self.key_sums.shape[1] if self.key_sums.ndim == 4 else 0

    @property
    def beside_the_model(self) -> tuple[Tensor, ...]:
        """All tensors on the model's device."""
        placed = () if self.coordinates is None else (self.coordinates,)
        return (self.key_sums, *placed, *((*self.keys, *self.values) if self.tier == "device" else ()))

    def encoded(
        self,
        keys: Float[Tensor, "rows tokens heads head_dim"],
        values: Float[Tensor, "rows tokens heads head_dim"],
        coordinates: Tensor | None = None,
    ) -> Encoded:
        """Return a block as a slot holds it, which may need memory; coordinates as those of `Encoded`."""
        stored_keys = self.codec.encode_keys(lengthened(keys, self.slot_tokens))  # a slot has one size
        stored_values = self.codec.encode_values(lengthened(values, self.slot_tokens))
        # Of the keys as given, neither coded nor filled up, so that the score of `topk` is exact in any form.
        return Encoded(stored_keys, stored_values, keys.float().sum(dim=1), coordinates)

    def write(self, slot: int, block: Encoded) -> None:
        """Put a block into a free slot, for which there is room after `reserve`.

        What the device has yet to read there it reads before, and what it reads later is there. Where that lies in one
        piece of pinned memory nobody waits, but for who looks from the host (`settle`).
        """
        self.marks[slot] = Mark()  # first: a half-written slot must not pass for the block of before
        for rooms, parts in ((self.keys, block.keys), (self.values, block.values)):
            for each, part in zip(rooms, parts, strict=True):
                place = each[:, slot]
                # Torch copies what lies apart through memory of its own, which need not be there in time.
                place.copy_(part, non_blocking=overlaps(self.tier, part.device) and place.is_contiguous())
        if overlaps(self.tier, self.key_sums.device):
            self._written = torch.cuda.Event()
            self._written.record(torch.cuda.current_stream(self.key_sums.device))
        self.key_sums[:, slot] = block.key_sums
        if block.coordinates is not None:
            assert self.coordinates is not None
            self.coordinates[:, slot, : block.coordinates.shape[1]] = block.coordinates

    def settle(self) -> None:
        """Wait until blocks that are on their way to host memory lie there."""
        if self._written is not None:
            self._written.synchronize()
            self._written = None

    def reserve(
        self, slots: int, like: Float[Tensor, "rows tokens heads head_dim"], coordinates: Tensor | None = None
    ) -> None:
        """Make room for so many blocks; what the archive holds stays as it is.

        Whatever may fail for want of memory is done here, before a commit begins to write.

        Args:
            slots: how many there must be at least.
            like: keys of a block.
            coordinates: its places, if they depend on the data.
        """
        if self._shared:  # a fork goes on reading what is here
            self._own()
        rows, _, heads, head_dim = like.shape
        held = 0 if self.coordinates is None else self.coordinates.shape[1]
        if coordinates is not None and held < slots:
            shape = (coordinates.shape[0], slots - held, self.slot_tokens, *coordinates.shape[2:])
            new = coordinates.new_zeros(shape, dtype=torch.float32)  # enough: t counts from the block's first frame
            self.coordinates = new if self.coordinates is None else torch.cat([self.coordinates, new], dim=1)
        if slots > self.slots:
            self.dtype = like.dtype
            keys, values = form(self.codec, self.slot_tokens, heads, head_dim, like.dtype)
            self.keys = self._grown(self.keys, keys, (rows, slots), like.device)
            self.values = self._grown(self.values, values, (rows, slots), like.device)
            sums = torch.zeros(rows, slots, heads, head_dim, dtype=torch.float32, device=like.device)
            sums[:, : self.slots] = self.key_sums if self.slots else 0
            # Last, since `slots` goes by it: an interrupt before it leaves room that is made again.
            self.key_sums = sums

    def restore(self, slot: int, slots: int, dtype: torch.dtype, block: Encoded) -> None:
        """Put a block that was stored before into one of `slots` slots.

        Args:
            slot: index of the slot.
            slots: how many this archive gets.
            dtype: of keys and values once they are decoded.
            block: the block, its places filled up to a slot's tokens.

        Raises:
            ValueError: if it is not what the codec makes of a block.
        """
        rows, heads, head_dim = block.key_sums.shape
        wanted = form(self.codec, self.slot_tokens, heads, head_dim, dtype)
        asked = [((rows, *shape), kind) for parts in wanted for shape, kind in parts]
        given = [(tuple(each.shape), each.dtype) for each in (*block.keys, *block.values)]
        if asked != given:
            raise ValueError(f"{self.codec.name} stores {asked}, but the block is {given}")
        if self.slots and block.key_sums.shape != self.key_sums[:, 0].shape:
            raise ValueError(f"sums of keys are {tuple(block.key_sums.shape)}, unlike those of other blocks")
        like = block.key_sums.new_empty(rows, 0, heads, head_dim, dtype=dtype)
        self.reserve(slots, like, block.coordinates)
        self.write(slot, block)

    def block_keys(self, slot: int, tokens: int, rows: slice = slice(None)) -> Tensor:
        """Return keys `[some rows, tokens, heads, head_dim]` of a block, on the model's device."""
        return self._of_block(self.keys, "keys", slot, tokens, rows)

    def blocks_keys(self, slots: Sequence[int], ahead: Prefetch) -> Float[Tensor, "rows blocks tokens heads head_dim"]:
        """Return keys of several blocks, each as long as a slot, decoded at once, on the model's device."""
        device = self.key_sums.device
        parts = ahead.take(self, slots, device) or [in_order(each, slots, device) for each in self.keys]
        decoded = self._decoded([each.flatten(0, 1) for each in parts], "keys")  # [rows * blocks, tokens, ...]
        return decoded.unflatten(0, (-1, len(slots)))  # [rows, blocks, tokens, heads, head_dim]

    def begin(self, ahead: Prefetch) -> None:
        """Begin to bring to the model's device the keys that were asked for of another layer, for `blocks_keys`."""
        device = self.key_sums.device
        # Rooms are filled again and again, which no graph survives.
        if overlaps(self.tier, device) and not any(each.requires_grad for each in self.keys):
            ahead.begin(self, self.keys, device)

    def block_values(self, slot: int, tokens: int, rows: slice = slice(None)) -> Tensor:
        """Return values `[some rows, tokens, heads, head_dim]` of a block, on the model's device."""
        return self._of_block(self.values, "values", slot, tokens, rows)

    def gather(
        self, rows: slice, slots: Int[Tensor, "some chosen"], tokens: int
    ) -> tuple[Float[Tensor, "some all heads head_dim"], Float[Tensor, "some all heads head_dim"], Later | None]:
        """Return keys and values of the chosen slots, the first `tokens` of each, joined; each row has its choice.

        Keys of a codec that computes are made of what lies beside the model whenever they are rotated, by what is
        returned last, for else all layers would hold them decoded: the keys are then of the right shape, and no more.
        """
        select = selecting(self.tier, (*self.keys, *self.values), slots.device)
        # Where the host must know what is chosen: the one wait of a chunk and layer.
        known = [] if select else slots.tolist()

        def joined(stored: Stored, half: Half, some: Tensor) -> Tensor:
            if select:
                # In every forward, by what is there: a commit that failed may have made room for some of it.
                chosen = [  # [some * chosen, ...], of [some * slots, ...]
                    select(each[rows].flatten(0, 1), _flat(some, each.shape[1])) for each in stored
                ]
            else:
                chosen = [fetched(each[rows], known, slots.device) for each in stored]
            blocks = self._decoded(chosen, half)[:, :tokens]
            return blocks.unflatten(0, tuple(some.shape)).flatten(1, 2)  # [some, chosen * tokens, heads, head_dim]

        def later() -> Iterator[Tensor]:
            for some in slots.split(AT_ONCE, dim=1):
                yield joined(self.keys, "keys", some)

        values = joined(self.values, "values", slots)
        if self.decodes_later:
            # Expanded, it takes no memory; as NaN it shows if somebody attends it.
            return values.new_full((), torch.nan).expand_as(values), values, later
        return joined(self.keys, "keys", slots), values, None

    def fork(self) -> "Archive":
        """Return an independent archive that shares all memory with this one until either is written."""
        fork = copy(self)
        fork.marks = dict(self.marks)
        self._shared = fork._shared = True  # either may be the first to write
        return fork

    def _of_block(self, stored: Stored, half: Half, slot: int, tokens: int, rows: slice) -> Tensor:
        parts = [each[rows, slot].to(self.key_sums.device, non_blocking=True) for each in stored]
        # What is decoded with gradients must outlive the slot, which the next commit may write over.
        parts = [each.clone() if each.requires_grad else each for each in parts]
        return self._decoded(parts, half)[:, :tokens]

    def _decoded(self, stored: Sequence[Tensor], half: Half) -> Tensor:
        decode = self.codec.decode_keys if half == "keys" else self.codec.decode_values
        try:  # costs nothing, unlike `policy_call`: this is in every forward
            return decode(stored, self.slot_tokens, self.dtype)
        except Exception as error:
            name_policy(error, type(self.codec), f"decode_{half}")
            raise

    def _grown(self, old: Stored, parts: Form, size: tuple[int, int], device: torch.device) -> Stored:
        new = []
        self.settle()  # the host copies below, and must not overtake the device
        for number, (shape, kind) in enumerate(parts):
            larger = room((*size, *shape), kind, device, self.tier)
            if old:
                larger[:, : old[number].shape[1]] = old[number]
            new.append(larger)
        return tuple(new)

    def _own(self) -> None:
        self.settle()  # as in `_grown`
        self.keys, self.values = (
            # Not `clone`, which would neither pin the copy nor put it into a file.
            tuple(room(each.shape, each.dtype, self.key_sums.device, self.tier).copy_(each) for each in stored)
            for stored in (self.keys, self.values)
        )
        self.key_sums = self.key_sums.clone()
        self.coordinates = None if self.coordinates is None else self.coordinates.clone()
        self._shared = False


def _flat(chosen: Int[Tensor, "rows chosen"], slots: int) -> Int[Tensor, " all"]:
    """Return where what each row has chosen of so many slots lies among those of all rows."""
    if chosen.shape[0] == 1:
        return chosen[0]
    first = slots * torch.arange(chosen.shape[0], device=chosen.device)[:, None]  # [rows, 1]
    return (chosen + first).flatten()  # [rows * chosen]
