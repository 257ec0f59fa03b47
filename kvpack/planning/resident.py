"""All bytes that a generation's memory will hold, as `stats()["resident_bytes"]` reports them, without a model."""

from dataclasses import astuple, dataclass, replace
from functools import partial

import torch

from kvpack.memory.archive import grown_slots
from kvpack.memory.base import Memory
from kvpack.memory.codec import stored_bytes
from kvpack.memory.geometry import Geometry
from kvpack.memory.ledger import Ledger
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
from kvpack.memory.stack_plan import StackBook, StackPlan


@dataclass(frozen=True)
class Resident:
    """Memory of one guidance branch.

    Args:
        history: tokens of history that the last chunk attends.
        layer_bytes: held by each layer.
        shared_bytes: held once for all layers.
    """

    history: int
    layer_bytes: int
    shared_bytes: int

    def bytes(self, layers: int) -> int:
        """Return the bytes of all layers."""
        return layers * self.layer_bytes + self.shared_bytes


def resident(geometry: Geometry, memory: Memory, chunks: int, batch: int, channels: int = 16) -> Resident:
    """Return what is held after some chunks, of `batch` videos in one guidance branch.

    Args:
        geometry: the model at the video's size.
        memory: the policy.
        chunks: committed chunks.
        batch: videos generated together.
        channels: channels of a latent, of which a memory may keep something.
    """
    if isinstance(memory, Stack):
        counted = _counted(geometry, memory, chunks, batch)
        return _scaled(geometry, memory, chunks, batch, channels) if counted is None else counted
    return _rehearsed(geometry, memory, chunks, batch, channels)


def _counted(geometry: Geometry, stack: Stack, chunks: int, batch: int) -> Resident | None:
    """Count by the ledger; None if rows may attend different numbers of tokens, which depends on what is chosen."""
    ledger = Ledger(stack.partitioner, stack.chunk_frames, stack.archive_blocks)
    room = slots = history = 0
    due: set[int] = set()
    for _ in range(chunks):
        plan = StackPlan(stack, StackBook.of(ledger), stack.chunk_frames, geometry)
        if not (plan.uniform or plan.takes_all):
            return None
        mid = sum(span.tokens for span in plan.attended[: plan.chosen])
        whole = sum(piece.frames for piece in ledger.whole)
        history = whole * geometry.tokens_per_frame + mid
        room = max(room, history + stack.chunk_frames * geometry.tokens_per_frame)
        for _, slot in plan.step.leaving:
            slots = grown_slots(slots, slot)
        if stack.latent_compressor is not None:
            due |= {piece.first_frame for piece in plan.new_pieces if ledger.is_ever_compressed(piece)}
        ledger = plan.step.ledger
    number, width = geometry.dtype.itemsize, geometry.width
    block = stack.start(geometry, 0).archive.slot_tokens
    waiting = (piece for piece in ledger.whole if piece.first_frame in due)
    twins = sum(stack.compressor.span(piece.first_frame, piece.frames, geometry.grid).tokens for piece in waiting)
    stored = stored_bytes(stack.store, block, geometry.heads, geometry.head_dim, geometry.dtype)
    layer = batch * width * (2 * number * (room + twins) + 4 * slots)  # sums of keys are float32
    layer += batch * slots * stored if stack.tier == "device" else 0
    placed = {"span": 0, "row": 1, "head": geometry.heads}[stack.compressor.places]
    layer += batch * slots * block * placed * 12  # (t, y, x) in float32
    return Resident(history, layer, 0 if stack.keeps_rotated else batch * width * number * room)


def _rehearsed(geometry: Geometry, memory: Memory, chunks: int, batch: int, channels: int) -> Resident:
    """Run the memory in one layer, in frames of a few tokens; of the true size if bytes are not proportional to it."""

    def sized(columns: int) -> Resident:
        return _scaled(replace(geometry, grid=(1, columns)), memory, chunks, batch, channels)

    four, eight, twelve = (sized(columns) for columns in (4, 8, 12))
    per_token = [(b - a) // 4 for a, b in zip(astuple(four), astuple(eight), strict=True)]
    if any(a + 8 * each != b for a, b, each in zip(astuple(four), astuple(twelve), per_token, strict=True)):
        return _scaled(geometry, memory, chunks, batch, channels)
    beyond = geometry.tokens_per_frame - 4
    return Resident(*(held + beyond * each for held, each in zip(astuple(four), per_token, strict=True)))


def _scaled(geometry: Geometry, memory: Memory, chunks: int, batch: int, channels: int) -> Resident:
    """Run the memory in tiny heads, three times: its bytes are linear in heads and in all their channels."""
    runs = []
    for heads, head_dim in ((1, 6), (1, 12), (2, 6)):
        parts = (head_dim // 3,) * 3
        tiny = replace(geometry, layers=1, heads=heads, head_dim=head_dim, rope_split=parts, rotary=None)
        session = Session(memory, tiny)
        shape = batch, memory.chunk_frames * geometry.tokens_per_frame, heads, head_dim
        zeros = torch.zeros(shape, dtype=geometry.dtype)
        latents = torch.zeros(batch, channels, memory.chunk_frames, *geometry.grid)
        for _ in range(chunks):
            for announce in (partial(session.denoise, 0), partial(session.commit, latents=latents)):
                (layer,) = announce()
                layer.attend(zeros, zeros, zeros, lambda queries, keys, values: queries)
            for piece in session.pending_compressions():
                (layer,), twin = session.compress(piece), zeros[:, : session.twin_span(piece).tokens]
                layer.attend(twin, twin, twin, lambda queries, keys, values: queries)
            session.finish_commit()
        stats = session.stats()
        shared = stats["workspace_bytes"]
        runs.append((stats["attended_tokens"], stats["resident_bytes"] - shared, shared))

    def scaled(small: int, wide: int, two: int) -> int:
        by_channel, by_head = (wide - small) // 6, two - wide
        return by_channel * geometry.width + by_head * geometry.heads + small - 6 * by_channel - by_head

    layer_bytes, shared = (scaled(*(run[which] for run in runs)) for which in (1, 2))
    return Resident(runs[0][0], layer_bytes, shared)
