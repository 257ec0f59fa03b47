"""All bytes that a generation's memory will hold, as `stats()["resident_bytes"]` reports them, without a model."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import islice

import torch

from kvpack.memory.base import Memory
from kvpack.memory.codec import stored_bytes
from kvpack.memory.divided import Divided, narrowed
from kvpack.memory.geometry import Geometry
from kvpack.memory.room import FAR, arena_room, period, until_settled
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
from kvpack.memory.stack_plan import StackBook, StackPlan


@dataclass(frozen=True)
class Resident:
    """Memory of one guidance branch.

    Args:
        history: tokens of history that the last chunk attends; of heads that attend unlike numbers, their mean.
        layer_bytes: held by each layer; of layers that hold unlike numbers, their mean.
        shared_bytes: held once for all layers.
    """

    history: int | Fraction
    layer_bytes: int | Fraction
    shared_bytes: int

    def bytes(self, layers: int) -> int:
        """Return the bytes of all layers."""
        return int(layers * self.layer_bytes) + self.shared_bytes


def resident(geometry: Geometry, memory: Memory, chunks: int, batch: int, channels: int = 16) -> Resident:
    """Return what is held after some chunks, of `batch` videos in one guidance branch.

    Args:
        geometry: the model at the video's size.
        memory: the policy.
        chunks: committed chunks.
        batch: videos generated together.
        channels: channels of a latent, of which a memory may keep something.
    """
    if isinstance(memory, Divided):
        held = _divided(geometry, memory, lambda part, stack: resident(part, stack, chunks, batch, channels))
        assert held is not None
        return held
    chunks = as_many(geometry, memory, chunks, batch, channels)
    if not isinstance(memory, Stack):
        return _rehearsed(geometry, memory, chunks, batch, channels)[-1]
    counted = list(islice(_counted(geometry, memory, batch), chunks))
    if all(each.exact for each in counted):
        return counted[-1].held
    return _scaled(geometry, memory, chunks, batch, channels)[-1]


def as_many(geometry: Geometry, memory: Memory, chunks: int, batch: int, channels: int = 16) -> int:
    """Return the fewest chunks behind which as much is held: what repeats in `FAR` chunks is taken to go on so.

    The arguments are those of `resident`.
    """
    if chunks <= FAR:  # few enough to count each
        return chunks
    small = replace(geometry, grid=(1, 4))  # whether it repeats shows in few tokens
    each = _counted(geometry, memory, batch) if isinstance(memory, Stack) else _run(small, memory, batch, channels)
    counted = until_settled(each, chunks, FAR)
    every, beyond = period(counted, FAR), chunks - len(counted)
    return len(counted) - (-beyond % every) if every else chunks  # at the last chunk's place in the period


def passing(geometry: Geometry, memory: Memory, rows: int, steps: int) -> tuple[int, int]:
    """Return how often what a memory holds is there while a chunk is made, and the bytes kept of the chunk meanwhile.

    One whose blocks lie in arenas is there once. Where it chooses, archived keys of one layer may be on their way from
    elsewhere, or what is computed of them is as large. One that is a value has what it attends beside what it held, and
    the chunk's own keys, values and queries are kept until they are remembered.

    Args:
        geometry: the model at the video's size.
        memory: the policy.
        rows: videos generated together, times guidance branches.
        steps: denoising steps of a chunk.
    """
    if memory.in_place:
        return 1, rows * _keys_on_their_way(geometry, memory) if isinstance(memory, Stack) else 0
    # A replay of several chunks in one forward is no more: what it replays is not held meanwhile.
    chunk = rows * memory.chunk_frames * geometry.tokens_per_frame * geometry.kv_bytes_per_token
    # Keys and values, and queries, which are half as much: those of all forwards where the memory needs them.
    return 2, chunk + chunk // 2 * (steps + 1 if memory.needs_queries else 1)


def _keys_on_their_way(geometry: Geometry, stack: Stack) -> int:
    """Return the bytes of one layer's archived keys, of an archive whose end is known, if some of them are chosen."""
    blocks = [stack.archive_blocks, None if geometry.frames is None else geometry.frames // stack.chunk_frames]
    most = min((each for each in blocks if each is not None), default=0)
    if stack.selector.limit(most) == most:  # all are attended: none is read to choose
        return 0
    return most * stack.start(geometry, 0).archive.slot_tokens * geometry.width * geometry.dtype.itemsize


def most_resident(
    geometry: Geometry,
    memory: Memory,
    chunks: int | None,
    batch: int,
    channels: int = 16,
    first_frames: int | None = None,
) -> Resident | None:
    """Return the most that is held behind any chunk; None if it grows without end in a video that has none.

    Where rows may attend blocks of unequal size it is an upper bound, for it depends on what is chosen.

    Args:
        geometry: the model at the video's size.
        memory: the policy.
        chunks: committed chunks; None is a video without end.
        batch: videos generated together.
        channels: channels of a latent, of which a memory may keep something.
        first_frames: latent frames of the first chunk, if it is shorter than the rest.
    """
    if isinstance(memory, Divided):
        size = chunks, batch, channels, first_frames  # all parts hold the most at the end, for they archive nothing
        return _divided(geometry, memory, lambda part, stack: most_resident(part, stack, *size))
    far = FAR if chunks is None else chunks
    if isinstance(memory, Stack):
        if chunks is None and memory.archive_blocks is not None:  # a full archive repeats only once it is full
            far += memory.archive_blocks
        counted = until_settled(_counted(geometry, memory, batch, first_frames), far)
        held = [each.held for each in counted]
    else:
        small = replace(geometry, grid=(1, 4))
        counted = until_settled(_run(small, memory, batch, channels, first_frames), far)
        held = _rehearsed(geometry, memory, len(counted), batch, channels, first_frames)
    if chunks is None and len(counted) == far:
        return None
    return max(held, key=lambda each: each.bytes(geometry.layers))


def _divided(geometry: Geometry, memory: Divided, one: Callable[[Geometry, Stack], Resident | None]) -> Resident | None:
    """Return what all parts hold together, of what `one` holds with some heads; None if one grows without end."""
    kinds = Counter(part.kind for layer in memory.parts(geometry) for part in layer)
    history, held, shared = 0, 0, 0
    for (stack, heads), count in kinds.items():
        each = one(narrowed(geometry, heads), memory.stacks[stack])
        if each is None:
            return None
        history += int(each.history) * heads * count
        held += int(each.layer_bytes) * count
        shared += each.shared_bytes
    return Resident(Fraction(history, geometry.layers * geometry.heads), Fraction(held, geometry.layers), shared)


@dataclass(frozen=True)
class _Counted:
    """What a stack holds behind a chunk, and what that follows from.

    Args:
        held: the bytes; an upper bound unless `exact`.
        archived: compressed blocks.
        whole: frames of each whole piece.
        exact: whether it does not depend on what is chosen.
    """

    held: Resident
    archived: int
    whole: tuple[int, ...]
    exact: bool


def _counted(geometry: Geometry, stack: Stack, batch: int, first_frames: int | None = None) -> Iterator[_Counted]:
    """Count by the ledger, chunk after chunk."""
    ledger = stack.ledger()
    number, each, tokens_of = geometry.dtype.itemsize, geometry.tokens_per_frame, stack.compressor.span
    archive = stack.start(geometry, 0).archive
    block = archive.slot_tokens
    shape = geometry.heads, geometry.head_dim, geometry.dtype
    stored = stored_bytes(stack.store, block, *shape) if stack.tier == "device" else 0
    placed = {"span": int(stack.eviction == "merged"), "row": 1, "head": geometry.heads}[stack.compressor.places]
    # Of a slot: sums of keys in float32, (t, y, x) of tokens that have places of their own, and the block itself.
    slot_bytes = 4 * geometry.width + 12 * block * placed + stored
    coming = first_frames or stack.chunk_frames
    keys, room = arena_room(stack, geometry, coming)  # as the arena is made; 0 where nobody can know
    joined = slots = 0
    due, apart, seen = set[int](), set[int](), set[tuple[int, int]]()
    while True:
        plan = StackPlan(stack, StackBook.of(ledger), coming, geometry)
        in_place, before = plan.uniform or plan.takes_all, ledger
        sizes = [span.tokens for span in plan.attended]
        seen |= set(zip((piece.block_frames for piece in plan.mid), sizes, strict=True))
        # Nobody knows which blocks are selected least: of several lengths, the longest may stay, or one of each.
        unknown = stack.eviction == "least-selected" and len({frames for frames, _ in seen}) > 1
        largest = sorted(sizes)[len(sizes) - plan.chosen :]  # whichever are chosen
        if unknown:
            largest = [max(tokens for _, tokens in seen)] * plan.chosen
        mid = sum(largest)
        history = sum(piece.frames for piece in before.whole) * each + mid
        new, needed = {piece.first_frame for piece in plan.new_pieces}, history + coming * each
        if in_place or unknown:
            room, apart = max(room, needed), set[int]() if not unknown else apart
            keys = max(keys, needed - (mid if archive.decodes_later and plan.uniform and not unknown else 0))
        if not in_place or unknown:
            # Rows differ: each is gathered in a workspace of its own, and what is new, or replayed, lies in no arena.
            joined, replayed = max(joined, needed), before.frames - sum(before.replayable(stack.replay_frames))
            apart |= new | {piece.first_frame for piece in before.whole if piece.first_frame >= replayed}
        for _, slot in plan.step.leaving:
            slots = before.slots(slots, slot, geometry.frames)
        if stack.latent_compressor is not None:
            due |= {piece.first_frame for piece in before.compressed_pieces()}
        ledger, coming = plan.step.ledger, stack.chunk_frames
        twins = sum(
            tokens_of(piece.first_frame, piece.frames, geometry.grid).tokens
            for piece in ledger.whole
            if piece.first_frame in due
        )
        loose = sum(piece.frames for piece in ledger.whole if piece.first_frame in apart) * each
        # The arena's keys and values, blocks and twins in tensors of their own, and slots of the archive.
        layer = batch * (geometry.width * number * (room + keys + 2 * (loose + twins)) + slots * slot_bytes)
        rotated = 0 if stack.keeps_rotated else batch * room  # kept rotated, keys need no buffer
        # Rows that are gathered take turns in the room of one, for keys and for values.
        shared = geometry.width * number * (max(rotated, joined) + joined)
        whole = tuple(piece.frames for piece in ledger.whole)
        yield _Counted(Resident(history, layer, shared), len(ledger.archive), whole, not joined)


def _rehearsed(
    geometry: Geometry, memory: Memory, chunks: int, batch: int, channels: int, first_frames: int | None = None
) -> list[Resident]:
    """Run the memory in one layer, in frames of a few tokens; of the true size if bytes are not proportional to it."""

    def sized(columns: int) -> list[Resident]:
        return _scaled(replace(geometry, grid=(1, columns)), memory, chunks, batch, channels, first_frames)

    held, beyond = [], geometry.tokens_per_frame - 4
    for trio in zip(*map(sized, (4, 8, 12)), strict=True):  # the third tells whether two sizes say it all
        four, eight, twelve = map(astuple, trio)
        per_token = [(b - a) // 4 for a, b in zip(four, eight, strict=True)]
        if any(a + 8 * each != b for a, b, each in zip(four, twelve, per_token, strict=True)):
            return _scaled(geometry, memory, chunks, batch, channels, first_frames)
        held.append(Resident(*(a + beyond * each for a, each in zip(four, per_token, strict=True))))
    return held


def _scaled(
    geometry: Geometry, memory: Memory, chunks: int, batch: int, channels: int, first_frames: int | None = None
) -> list[Resident]:
    """Run the memory in tiny heads, three times: its bytes are linear in heads and in all their channels."""
    few = 12  # channels: codecs may pack four, and each of three axes has pairs
    shapes = ((1, few), (1, 2 * few), (2, few))
    runs = [islice(_run(geometry, memory, batch, channels, first_frames, *shape), chunks) for shape in shapes]

    def scaled(small: int, wide: int, two: int) -> int:
        by_channel, by_head = (wide - small) // few, two - wide
        # Bytes are a + b * width + c * heads, of which three runs say a, b and c.
        return by_channel * geometry.width + by_head * geometry.heads + small - few * by_channel - by_head

    held = []
    for each in zip(*runs, strict=True):
        layer, shared = (scaled(*sizes) for sizes in list(zip(*map(astuple, each), strict=True))[1:])
        held.append(Resident(each[0].history, layer, shared))
    return held


def _run(
    geometry: Geometry,
    memory: Memory,
    batch: int,
    channels: int,
    first_frames: int | None = None,
    heads: int = 1,
    head_dim: int = 6,
) -> Iterator[Resident]:
    """Run the memory in one layer of a model of so many heads, chunk after chunk."""
    # A family's own rotations may not fit such heads; bytes do not depend on them.
    tiny = replace(geometry, layers=1, heads=heads, head_dim=head_dim, rope_split=(head_dim // 3,) * 3, rotary=None)
    session = Session(memory, tiny)
    if first_frames is not None:
        session.expect(first_frames)
    while True:
        frames = session.coming_frames
        shape = batch, frames * geometry.tokens_per_frame, heads, head_dim
        queries, keys, values = (torch.zeros(shape, dtype=geometry.dtype) for _ in range(3))
        latents = torch.zeros(batch, channels, frames, *geometry.grid)
        for announce in (partial(session.denoise, 0), partial(session.commit, latents=latents)):
            (layer,) = announce()
            # The attention computes nothing, for only what is held counts.
            layer.attend(queries, keys, values, lambda queries, keys, values: queries)
        for piece in session.pending_compressions():
            (layer,), twin = session.compress(piece), keys[:, : session.twin_span(piece).tokens]
            layer.attend(twin, twin, twin, lambda queries, keys, values: queries)
        session.finish_commit()
        stats = session.stats()
        shared = stats["workspace_bytes"]
        yield Resident(stats["attended_tokens"], stats["resident_bytes"] - shared, shared)
