"""What a chunk costs beyond the transformer's own work, at the size of one layer of Wan2.1-1.3B on 27,872 keys.

One `WanTransformerBlock` (1536 wide, 12 heads, 8960 in the feed-forward, random weights) generates chunks of 6,240
tokens (4 frames of 30x52) from the `packforcing` memory: 8 sink frames, 16 of 20 archived blocks of 182 tokens,
4 recent frames, and the chunk.

own work    the block's forward with its 27,872 rotated keys and values already in place; a chunk is 4 denoising
            forwards and the commit's
overhead    everything else that kvpack does in a chunk: choosing, placing and gathering, rotating the history and
            writing the current keys and values in each forward, as other layers have had the workspace in between, and
            the commit. Timed with an attention that does nothing
end to end  a whole chunk through kvpack over the same forwards with keys in place, taken in turns, minus 1 (fp32 only,
            for its length). Nothing is left out, but it is a difference of two long times
plain       keeps keys before RoPE too, but concatenates and rotates all of them in every forward (choice and angles for
            free)

"packforcing" is that stack as it comes, which keeps tokens (`keep-farthest`) and chooses by attention (`softmax-mass`)
among a full archive, 128 blocks; with `int8` all of them are decoded to be looked at. `pool` stands for what is summed.

With `lr` a chunk's compressed twin is made in latent space: its own forward through the layer counts as overhead, and
so does a 30th (the layer's share) of shrinking the decoded pixels and encoding them with a VAE of Wan's size in fp32.
Decoding does not: the user's video needs it. Positions and angles count whole, though 30 layers share them.

Values are medians over chunks (own work: over forwards), low and high the least and the greatest.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKLWan

from benchmarks.clock import seconds
from benchmarks.report import Bar, Row, samples, say, script
from benchmarks.wan_layer import FRAMES, SHRINK, STEPS, TINY, TWIN, WAN, WAN_LAYERS, Layer, Size
from kvpack import LatentChunk
from kvpack.adapters.wan.compression import embed
from kvpack.adapters.wan.vae import encode
from kvpack.policies.lr import LowResolutionCompressor

BARS = (
    Bar("overhead of a chunk over the layer's own work", "kvpack, pool", "overhead / own work", 0.01),
    Bar("the same as it comes, behind a full archive", "packforcing, dense", "overhead / own work", 0.01),
    Bar("the same in int8", "packforcing, int8", "overhead / own work", 0.03),
    Bar("the same with twins that a layer's forward makes", "kvpack, lr", "overhead / own work", 0.05),
    Bar("the plain version's output is kvpack's", "plain", "relative difference", 0.02, timed=False),
)


def shrink_seconds(size: Size) -> float:
    """Seconds of one layer's share of making a twin's hidden tokens from decoded pixels."""
    vae = AutoencoderKLWan(base_dim=size.vae_width).eval()
    model = SimpleNamespace(patch_embedding=torch.nn.Conv3d(16, size.width, (1, 2, 2), (1, 2, 2)), dtype=torch.float32)
    height, width = (16 * side for side in size.grid)
    pixels = torch.rand(1, 3, 4 * FRAMES, height, width)
    chunk = LatentChunk(
        latents=torch.zeros(1, 16, FRAMES, height // 8, width // 8),
        first_frame=0,
        grid=size.grid,
        pixels=lambda: pixels,
        encode=partial(encode, vae),
        embed=partial(embed, model),
        pixels_per_token=(16, 16),
        width=size.width,
        dtype=torch.float32,
    )
    return median(seconds(partial(LowResolutionCompressor().tokens, chunk)) for _ in range(3)) / WAN_LAYERS


def kvpack_rows(subject: str, chunks: list[dict[str, float]], chunk_seconds: float) -> list[Row]:
    """Milliseconds of each part, and the ratio of all to a chunk's own work."""
    parts = {name: [1e3 * chunk[name] for chunk in chunks] for name in chunks[0]}
    rows = [samples(subject, name, values, "ms") for name, values in parts.items()]
    ratios = [chunk["overhead"] / chunk_seconds for chunk in chunks]
    return [*rows, samples(subject, "overhead / own work", ratios, "ratio")]


def pool_rows(size: Size, dtype: torch.dtype, name: str) -> tuple[list[Row], float]:
    """The layer's own work, kvpack with `pool`, and the plain version; seconds of a chunk's own work."""
    layer = Layer(size, dtype, "pool")
    say(f"overhead: {name}, parts")
    parts = [layer.parts() for _ in range(size.chunks)]
    plain = [layer.plain() for _ in range(size.chunks)]
    say(f"overhead: {name}, whole forwards")
    whole = layer.whole() if dtype == torch.float32 else None
    forwards = whole[1] if whole else layer.in_place()
    chunk_seconds = (STEPS + 1) * median(forwards)
    keys = layer.session.caches[0].lengths[0] + layer.tokens
    subject, beside = f"kvpack, pool, {name}", f"plain: concatenates and rotates in every forward, {name}"
    end_to_end = [samples(subject, "end to end - 1", [whole[0] / sum(forwards) - 1], "ratio")] if whole else []
    return [
        samples(f"own work, {name}", f"forward, {layer.tokens:,} queries, {keys:,} keys in place", forwards, "s"),
        *kvpack_rows(subject, parts, chunk_seconds),
        *end_to_end,
        samples(beside, "overhead", [1e3 * spent for spent in plain], "ms"),
        samples(beside, "overhead / own work", [spent / chunk_seconds for spent in plain], "ratio"),
        samples(beside, "relative difference of its output to kvpack's", [layer.difference()], "ratio"),
    ], chunk_seconds


def lr_rows(size: Size, dtype: torch.dtype, name: str, chunk_seconds: float, share: float) -> list[Row]:
    """Kvpack with `lr`."""
    layer = Layer(size, dtype, "lr")
    say(f"overhead: {name}, lr")
    chunks = []
    for _ in range(size.chunks):
        extra = {TWIN: layer.twin(), SHRINK: share}
        chunk = layer.parts()
        overhead = chunk.pop("overhead") + sum(extra.values())
        chunks.append({**chunk, **extra, "overhead": overhead})
    return kvpack_rows(f"kvpack, lr, {name}", chunks, chunk_seconds)


def default_rows(size: Size, dtype: torch.dtype, name: str, chunk_seconds: float) -> list[Row]:
    """The stack as it comes behind a full archive, dense and in eight bits."""
    rows = []
    for store in ("dense", "int8"):
        say(f"overhead: {name}, packforcing, {store}")
        layer = Layer(size, dtype, "keep-farthest", "softmax-mass", store, archived=128)
        parts = [layer.parts() for _ in range(size.chunks)]
        rows += kvpack_rows(f"packforcing, {store}, {name}", parts, chunk_seconds)
    return rows


@torch.no_grad()
def run(small: bool = False) -> list[Row]:
    """Overhead in fp32 and bf16."""
    size, rows = TINY if small else WAN, []
    share = shrink_seconds(size)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        pool, chunk_seconds = pool_rows(size, dtype, name)
        rows += [*pool, *default_rows(size, dtype, name, chunk_seconds)]
        rows += lr_rows(size, dtype, name, chunk_seconds, share)
    return rows


if __name__ == "__main__":
    script("overhead", __doc__, run, BARS)
