"""What keeping and finding tokens costs in a chunk, at the size of one layer of Wan2.1-1.3B.

One `WanTransformerBlock` (1536 wide, 12 heads, random weights) attends 27,872 keys that lie in place, with 6,240
queries; a chunk is five such forwards. Once a chunk each compressor keeps 182 tokens of a block of 6,240, and each
selector chooses 16 of 20 blocks of 182 tokens.

On paper, for a GPU: `keep-farthest` reads the block, 38 MB of float32, once a round, 16 times, and multiplies it with
182 vectors, 3.5 GFLOP in all; `softmax-mass` multiplies 256 queries with all archived keys, 17 GFLOP for 117 blocks.
The five forwards are 8 TFLOP.

Values are medians, low and high the least and the greatest; all figures of a dtype are of one run, on one thread.
"""

from __future__ import annotations

from functools import partial
from statistics import median

import torch

from benchmarks.clock import seconds
from benchmarks.report import Bar, Row, samples, say, script
from benchmarks.wan_layer import CHOOSE, FRAMES, STEPS, TINY, WAN, Layer, Size, nothing
from kvpack import KVBlock, Span
from kvpack.memory.blocks import grid_coordinates
from kvpack.plugins.registry import registry
from kvpack.policies.keep import KeepCompressor

RATIO = "time / a chunk's forwards"
BARS = (
    Bar("keeping tokens, of a chunk's forwards", "keep", RATIO, 0.01),
    Bar("choosing by attention, of a chunk's forwards", "softmax-mass", RATIO, 0.01),
)


def compressors() -> dict[str, KeepCompressor]:
    """Every installed compressor that keeps, and the exact greedy choice."""
    names = [name for name in registry().names("compressor") if name.startswith("keep-")]
    made = {name: registry().policy("compressor", name) for name in names}
    return {**made, "exact keep-farthest": registry().policy("compressor", "keep-farthest", {"rounds": 10**6})}


def rows_of(subject: str, spent: list[float], chunk_seconds: float) -> list[Row]:
    """Milliseconds, and their ratio to a chunk's own work."""
    return [
        samples(subject, "time", [1e3 * each for each in spent], "ms"),
        samples(subject, RATIO, [each / chunk_seconds for each in spent], "ratio"),
    ]


def block_of(layer: Layer) -> KVBlock:
    """Return a block of random keys, with as many queries as any compressor asks for."""
    queries, keys, values = layer.projections()
    span = Span(0, FRAMES, grid_coordinates(FRAMES, layer.size.grid))
    return KVBlock(keys, values, span, queries[:, :: max(1, queries.shape[1] // 256)])


def dtype_rows(size: Size, dtype: torch.dtype, name: str) -> list[Row]:
    """All figures of a dtype."""
    layer = Layer(size, dtype, "keep-farthest", "softmax-mass")
    say(f"keeping: {name}, forwards")
    chosen_by = {"softmax-mass": [layer.parts()[CHOOSE] for _ in range(size.chunks)]}
    layer.denoise(0)
    layer.memory.attend(*layer.projections(), nothing)
    forwards = layer.in_place()
    chunk_seconds, tokens = (STEPS + 1) * median(forwards), f"{layer.tokens:,}"
    rows = [samples(f"own work, {name}", f"forward, {tokens} queries, keys in place", forwards, "s")]
    for each, policy in compressors().items():
        say(f"keeping: {name}, {each}")
        block, grid = block_of(layer), size.grid
        policy.compress(block, grid)
        spent = [seconds(partial(policy.compress, block, grid)) for _ in range(size.chunks)]
        rows += rows_of(f"{each}, {policy.count(FRAMES, grid)} of {tokens}, {name}", spent, chunk_seconds)
    say(f"keeping: {name}, selectors")
    other = Layer(size, dtype, "keep-farthest", "topk")
    chosen_by["topk"] = [other.parts()[CHOOSE] for _ in range(size.chunks)]
    for selector, spent in chosen_by.items():
        rows += rows_of(f"{selector}, {name}", spent, chunk_seconds)
    return rows


@torch.no_grad()
def run(small: bool = False) -> list[Row]:
    """Both dtypes."""
    size = TINY if small else WAN
    return [
        row
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for row in dtype_rows(size, dtype, name)
    ]


if __name__ == "__main__":
    script("keeping", __doc__, run, BARS)
