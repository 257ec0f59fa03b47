"""What each form of an archive holds, and how far it is off, beside bfloat16 as it is.

Bytes are those of one layer of Wan2.1-1.3B at 832x480 behind a full archive of 128 blocks, of which 16 are attended, as
planned: what `packforcing` holds, minus what it holds without a middle. Errors are relative L2. "outliers" are blocks
of 182 normal numbers a channel, where a thirtieth of the channels of keys are ten times as wide and off centre, and one
number in 10,000 is thirty times as large; "toy" are all blocks of a video of the shipped pipeline before compression.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.leaderboard.rollout import pipeline
from benchmarks.report import SEED, Bar, Row, script
from kvpack.memory.base import Chunk
from kvpack.memory.codec import Codec, stored_bytes
from kvpack.memory.geometry import Geometry
from kvpack.memory.stack_plan import StackPlan
from kvpack.memory.stack_state import KeptBlock, new_blocks
from kvpack.planning.resident import resident
from kvpack.plugins.registry import registry
from kvpack.shipped import CALL, shipped_folder

GEOMETRY = Geometry(1, 12, 128, (30, 52), (44, 42, 42), dtype=torch.bfloat16)
CHUNKS, BLOCK = 134, 182
HELD, STORED = "archived and attended blocks / dense", "bytes of a block / dense"
BARS = (
    Bar("int8 holds at most this share", "int8", HELD, 0.55, timed=False),
    Bar("int4 holds at most this share", "int4", HELD, 0.32, timed=False),
)


def held(options: dict[str, object]) -> float:
    """Return bytes of one layer."""
    stack = registry().stack("packforcing", options)
    return float(resident(GEOMETRY, stack, CHUNKS, 1).layer_bytes)


def outliers(blocks: int) -> tuple[Tensor, Tensor]:
    """Return random keys and values `[blocks, 182, 12, 128]`."""
    draw = torch.Generator().manual_seed(SEED)
    keys, values = torch.randn(2, blocks, BLOCK, GEOMETRY.heads, GEOMETRY.head_dim, generator=draw)
    few = torch.randperm(GEOMETRY.width, generator=draw)[: GEOMETRY.width // 32]
    keys.flatten(2)[..., few] = 10 * keys.flatten(2)[..., few] + 20
    for each in (keys, values):
        each[torch.rand(each.shape, generator=draw) < 1e-4] *= 30
    return keys.bfloat16().float(), values.bfloat16().float()


@torch.no_grad()
def toy(frames: int) -> tuple[Tensor, Tensor]:
    """Return keys and values `[blocks, 64, 4, 32]` of all layers of a video."""
    found: list[tuple[Tensor, Tensor]] = []

    def kept(chunk: Chunk, plan: StackPlan) -> Iterator[KeptBlock]:
        found.append((chunk.tokens.keys.clone(), chunk.tokens.values.clone()))
        return new_blocks(chunk, plan)

    pipe = pipeline(shipped_folder())
    pipe.enable_packforcing()
    call = {**CALL, "num_inference_steps": 6, "generator": torch.Generator().manual_seed(SEED)}
    with patch("kvpack.memory.stack.new_blocks", kept):
        pipe("a red circle", num_frames=frames, output_type="latent", **call)
    keys, values = (torch.cat(each) for each in zip(*found, strict=True))
    return keys, values


def errors(codec: Codec, keys: Tensor, values: Tensor) -> tuple[float, float]:
    """Return how far keys and values are off that a codec has stored, relative L2."""
    tokens = keys.shape[1]
    made = codec.decode_keys(codec.encode_keys(keys), tokens, torch.float32)
    other = codec.decode_values(codec.encode_values(values), tokens, torch.float32)
    return float((made - keys).norm() / keys.norm()), float((other - values).norm() / values.norm())


def measure(small: bool) -> list[Row]:
    """Rows of every installed codec but the dense one."""
    nothing, shape = held({"topk": 0}), (BLOCK, GEOMETRY.heads, GEOMETRY.head_dim, torch.bfloat16)
    data = {"outliers": outliers(1 if small else 4), "toy": toy(65 if small else 257)}
    dense = registry().policy("codec", "dense")
    rows = []
    for name in sorted(set(registry().names("codec")) - {"dense"}):
        codec = registry().policy("codec", name)
        ratio = (held({"store": name}) - nothing) / (held({}) - nothing)
        found = {HELD: ratio, STORED: stored_bytes(codec, *shape) / stored_bytes(dense, *shape)}
        for what, blocks in data.items():
            off = errors(codec, *blocks)
            found |= {f"error of keys, {what}": off[0], f"error of values, {what}": off[1]}
        rows += [Row(name, metric, value, value, value, "ratio", 1) for metric, value in found.items()]
    return rows


if __name__ == "__main__":
    script("codecs", __doc__ or "", measure, BARS)
