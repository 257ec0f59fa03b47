"""Bytes that every installed memory holds after 120 chunks at the size of Wan2.1-1.3B (832x480, bfloat16).

One layer is driven without a model: an attention that returns its queries, random queries, keys, values and latents.
Thirty layers hold thirty times what one holds beside the workspace, which they share.

Bytes are affine in the number of heads: keys, values and sums have an axis of heads, positions and counts have none.
So they are measured with 1 and with 2 heads, and continued to 12; `measured(name, 12, small)` measures 12 at once.

resident_bytes             what `stats()` says, after the last commit
attended_and_chunk_bytes   keys and values of the history that the last chunk attended, and of the chunk
archive_bytes              keys and values of all compressed blocks
ratio                      resident_bytes / (attended_and_chunk_bytes + archive_bytes)
uncounted_bytes            what the collector finds alive beyond `resident_bytes`: storages of all tensors after the
                           last commit, minus those before the session (one layer)

Deterministic, one sample each.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.report import SEED, Bar, Row, say, script
from kvpack import Geometry, Session
from kvpack.memory.base import Memory
from kvpack.memory.divided import Divided
from kvpack.memory.stack import Stack
from kvpack.plugins.registry import registry

LAYERS, HEADS, CHUNKS, LATENT_CHANNELS = 30, 12, 120, 16
RATIO_STACK, RATIO_OTHER = "four-role stack, ", "other memory, "
#: What holds whole frames, of which a chunk attends a few: its ratio has no bar.
RATIO_SEARCHED = "searched memory, "
BARS = (
    Bar("four-role stacks hold what is attended and archived", RATIO_STACK, "ratio", 1.05),
    Bar("every other memory holds what is attended", RATIO_OTHER, "ratio", 1.10),
    Bar("stats() counts everything", "", "uncounted_bytes", 1_000_000, timed=False),
)


@dataclass(frozen=True)
class Held:
    """Bytes of one layer, of a number of heads.

    Args:
        resident: all that the session holds, `workspace` included.
        workspace: what all layers share.
        attended: keys and values of the last chunk's history.
        chunk: those of a chunk.
        archive: those of compressed blocks.
        uncounted: what else is alive.
    """

    resident: float
    workspace: float
    attended: float
    chunk: float
    archive: float
    uncounted: float

    def continued(self, twice: Held, heads: int) -> Held:
        """Return the bytes of `heads` heads, given those of one (this) and of two."""
        one, two = vars(self), vars(twice)
        return Held(**{name: one[name] + (heads - 1) * (two[name] - one[name]) for name in one})

    def of_layers(self, layers: int) -> Held:
        """Return the bytes of many layers."""
        resident = layers * (self.resident - self.workspace) + self.workspace
        return Held(
            resident,
            self.workspace,
            *(layers * each for each in (self.attended, self.chunk, self.archive)),
            self.uncounted,
        )


def geometry(heads: int, small: bool, layers: int = 1) -> Geometry:
    """Return a layer of Wan2.1-1.3B, or some, with fewer heads."""
    if small:
        return Geometry(layers, heads, 12, (4, 6), (4, 4, 4), dtype=torch.bfloat16)
    return Geometry(layers, heads, 128, (30, 52), (44, 42, 42), dtype=torch.bfloat16)


def queries_only(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Stand in for attention."""
    return queries


def drive(session: Session, chunks: int) -> None:
    """Generate chunks without a model: one denoising forward, the clean chunk's, and those of twins."""
    generator = torch.Generator().manual_seed(SEED)
    shape, (height, width) = session.geometry, session.geometry.grid

    def forward(layer: Any, tokens: int) -> None:
        size = (1, tokens, shape.heads, shape.head_dim)
        projected = (torch.randn(size, generator=generator).to(shape.dtype) for _ in range(3))
        layer.attend(*projected, queries_only)

    for _ in range(chunks):
        frames = session.coming_frames
        for layer in session.denoise(0):
            forward(layer, frames * shape.tokens_per_frame)
        latents = torch.randn((1, LATENT_CHANNELS, frames, 2 * height, 2 * width), generator=generator)
        if session.review(latents) is not None:  # made again, and committed as it is
            for layer in session.denoise(0):
                forward(layer, frames * shape.tokens_per_frame)
            session.settle()
        for layer in session.commit(latents=latents):
            forward(layer, frames * shape.tokens_per_frame)
        for piece in session.pending_compressions():
            for layer in session.compress(piece):
                forward(layer, session.twin_span(piece).tokens)
        session.finish_commit()


def alive() -> int:
    """Return the bytes of the storages of all tensors that are alive."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, Parameter)]  # none that only look like it
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def held(memory: Memory, shape: Geometry, chunks: int) -> Held:
    """Return the bytes after some chunks, of a video that is known to be so long."""
    before = alive()
    session = Session(memory, replace(shape, frames=chunks * memory.chunk_frames))
    drive(session, chunks)
    stats, chunk = session.stats(), memory.chunk_frames * shape.tokens_per_frame * shape.kv_bytes_per_token
    found = alive() - before
    resident = stats["resident_bytes"]
    return Held(
        resident, stats["workspace_bytes"], stats["attended_bytes"], chunk, stats["archive_bytes"], found - resident
    )


def kept_rows(subject: str, layer: Held, layers: int) -> list[Row]:
    """Return one memory's figures for a whole model."""
    whole = layer.of_layers(layers)
    attended = whole.attended + whole.chunk
    figures = {
        "resident_bytes": whole.resident,
        "workspace_bytes": whole.workspace,
        "attended_and_chunk_bytes": attended,
        "archive_bytes": whole.archive,
        "uncounted_bytes": whole.uncounted,
        "ratio": whole.resident / (attended + whole.archive),
    }
    return [
        Row(subject, name, value, value, value, "ratio" if name == "ratio" else "bytes", 1)
        for name, value in figures.items()
    ]


def measured(name: str, heads: int | None, small: bool) -> list[Row]:
    """Return the figures of an installed stack, with all heads at once or continued from 1 and 2."""
    memory, chunks = registry().stack(name, {}), 24 if small else CHUNKS
    layers = len(memory.shares) if isinstance(memory, Divided) else 1  # after so many they repeat
    if heads is None:
        one, two = (held(memory, geometry(count, small, layers), chunks) for count in (1, 2))
        layer = one.continued(two, HEADS)
    else:
        layer = held(memory, geometry(heads, small, layers), chunks)
    say(f"resident: {name}, {layer}")
    searched = RATIO_SEARCHED if hasattr(memory, "archive_frames") else RATIO_OTHER
    kind = RATIO_STACK if isinstance(memory, Stack) else searched
    return kept_rows(kind + name, layer, LAYERS // layers)


@torch.no_grad()
def run(small: bool = False, names: list[str] | None = None, heads: int | None = None) -> list[Row]:
    """Measure all installed stacks, or some."""
    return [row for name in names or registry().names("stack") for row in measured(name, heads, small)]


if __name__ == "__main__":
    script("resident", __doc__, run, BARS)
