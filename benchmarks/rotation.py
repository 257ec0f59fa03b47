"""How exact a rotated key still is after 10,000 chunks, in bf16: one rotation from the stored key, or one a chunk.

A sink key is moved along with the video: under `sink-shift` its position grows by a chunk every chunk. kvpack keeps
it before RoPE and rotates it once when a chunk is assembled, so that it is rounded twice (once stored, once rotated).
The plain way keeps it rotated, and rotates it on at every chunk. Both are compared with float64.

The value of "relative error" is that of all keys together, low and high are the least and the greatest of a token.
"worst pair" is the greatest error of a channel pair in units of two roundings, (1 + 2^-8)^2 - 1 of the pair's length:
at most 1 is within two roundings. Deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.report import SEED, Bar, Row, say, script
from kvpack import Stack
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.memory.rope import rotate, rotations
from kvpack.memory.session import Session
from kvpack.policies.all_blocks import AllSelector
from kvpack.policies.identity import IdentityCompressor
from kvpack.policies.sink_shift import SinkShiftReindexer
from kvpack.policies.window import WindowPartitioner

CHUNK = 4
GEOMETRY = Geometry(1, 2, 128, (2, 4), (44, 42, 42), dtype=torch.bfloat16)
STACK = Stack(
    "sink-shift", WindowPartitioner(3 * CHUNK, CHUNK), IdentityCompressor(), AllSelector(), SinkShiftReindexer(), CHUNK
)
TWO_ROUNDINGS = (1 + 2**-8) ** 2 - 1
BARS = (Bar("a rotated key stays within two roundings of float64", "kvpack", "worst pair", 1.0, timed=False),)


def exact(keys: Tensor, start: float) -> Tensor:
    """Keys of a chunk that starts at frame `start`, in float64."""
    positions = grid_coordinates(CHUNK, GEOMETRY.grid).double() + torch.tensor([start, 0.0, 0.0], dtype=torch.float64)
    angles = []
    for axis, width in enumerate(GEOMETRY.rope_split):
        frequencies = GEOMETRY.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(positions[:, axis, None] * frequencies)
    turns = torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angles, dim=-1))[None, :, None]
    return torch.view_as_real(torch.view_as_complex(keys.unflatten(-1, (-1, 2))) * turns).flatten(-2)


def errors(subject: str, chunks: int, rotated: Tensor, truth: Tensor) -> list[Row]:
    """Relative error of all keys and of the worst pair."""
    difference = rotated.double() - truth
    tokens = (difference.norm(dim=(2, 3)) / truth.norm(dim=(2, 3))).flatten()
    pairs = difference.unflatten(-1, (-1, 2)).norm(dim=-1) / truth.unflatten(-1, (-1, 2)).norm(dim=-1)
    overall, worst = float(difference.norm() / truth.norm()), float(pairs.max()) / TWO_ROUNDINGS
    name = f"at {chunks:,} chunks"
    return [
        Row(subject, f"relative error {name}", overall, float(tokens.min()), float(tokens.max()), "ratio", len(tokens)),
        Row(subject, f"worst pair {name}", worst, worst, worst, "ratio", pairs.numel()),
    ]


def run(small: bool = False) -> list[Row]:
    """Errors after 10, 100, 1,000 and 10,000 chunks."""
    marks = [10, 100] if small else [10, 100, 1_000, 10_000]
    generator = torch.Generator().manual_seed(SEED)
    shape = (1, CHUNK * GEOMETRY.tokens_per_frame, GEOMETRY.heads, GEOMETRY.head_dim)
    keys = torch.randn(shape, generator=generator, dtype=torch.float64)
    stored = keys.bfloat16()
    turn = rotations(torch.tensor([float(CHUNK), 0.0, 0.0]).expand(1, shape[1], 3), GEOMETRY)
    repeated = exact(keys, 0.0).bfloat16()
    session, once, moved, shifts = Session(STACK, GEOMETRY), [], [], 0
    for chunk in range(marks[-1] + 3):
        session.commit()
        session.layers[0].attend(stored, stored, stored, lambda queries, keys, values: queries)
        attended = session.caches[0].attended
        assert attended is not None
        assert isinstance(attended.tokens, tuple)
        start = float(attended.tokens[0].coordinates[0, 0, 0]) if chunk else 0.0
        if shifts < round(start) // CHUNK:
            shifts += 1
            repeated = rotate(repeated, turn)
            if shifts in marks:
                say(f"rotation: {shifts:,} chunks")
                truth = exact(keys, start)
                sink = session.attended(0)[0][:, : shape[1]]
                once += errors("kvpack: one rotation of the stored key", shifts, sink, truth)
                moved += errors("plain: rotated on at every chunk", shifts, repeated, truth)
        session.finish_commit()
    return once + moved


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are too small for more
    script("rotation", __doc__, run, BARS)
