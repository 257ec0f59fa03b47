"""What a generation will hold and compute: no model, no weights. Of a stack the ledger says it."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory.base import Memory
from kvpack.memory.codec import stored_bytes
from kvpack.memory.costs import LatentShape, channels_of
from kvpack.memory.geometry import Geometry
from kvpack.memory.ledger import Ledger
from kvpack.memory.roles import LatentCompressor
from kvpack.memory.stack import Stack
from kvpack.memory.stack_plan import StackBook, StackPlan
from kvpack.planning.resident import as_many, resident

#: Seconds of a video, thirty years, and frames a second.
_MOST = 1e9


@dataclass(frozen=True)
class Plan:
    """Tokens, bytes and operations of a generation.

    Tokens are those of one video and one guidance branch; bytes and operations are those of all of them.

    Args:
        stack: name of the stack.
        chunks: chunks generated; the last one is generated whole.
        frames: latent frames asked for.
        branches: guidance branches that bytes and operations are of.
        chunk_tokens: tokens of a chunk.
        attended_tokens: what the last chunk attends, itself included.
        attended_kv_bytes: keys and values of the history that the last chunk attends, itself not included.
        archive_blocks: compressed blocks kept after the last chunk.
        archive_tokens: their tokens.
        archive_kv_bytes: their keys and values, whether attended or not, in the form and on the tier of the stack.
        resident_kv_bytes: all that the memory holds, as `stats()["resident_bytes"]` says it: the attended history with
            room for a chunk, the archive with spare slots, and room for rotated keys, once for all layers.
        workspace_kv_bytes: of these, the working buffer that all layers share.
        full_tokens: tokens of all chunks at full resolution.
        full_kv_bytes: their keys and values, which full history would hold.
        kv_bytes_per_token: keys and values of one token over all layers.
        flops_per_chunk: the last chunk's denoising forwards and its commit forward if it has one; 0 if nobody counts
            them.
        compressor_parameters: learned numbers in each branch of a latent-space compressor.
        compressor_flops: making the last chunk's compressed twin: each branch, and "twin", what turns hidden tokens
            into keys and values. Decoding is not in it, for the user has the frames decoded anyway.
    """

    stack: str
    chunks: int
    frames: int
    branches: int
    chunk_tokens: int
    attended_tokens: int
    attended_kv_bytes: int
    archive_blocks: int
    archive_tokens: int
    archive_kv_bytes: int
    resident_kv_bytes: int
    workspace_kv_bytes: int
    full_tokens: int
    full_kv_bytes: int
    kv_bytes_per_token: int
    flops_per_chunk: int
    compressor_parameters: dict[str, int]
    compressor_flops: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return asdict(self)


def plan(
    geometry: Geometry,
    stack: Memory,
    frames: int,
    *,
    batch: int = 1,
    branches: int = 1,
    steps: int = 4,
    flops: Callable[[int, int], int] | None = None,
    latents: LatentShape | None = None,
) -> Plan:
    """Plan a generation of `frames` latent frames.

    The bytes are those that `pipe.packforcing.stats()` reports after it. If mid blocks differ in size, which of them a
    selector will choose is not known; the plan takes the newest.

    Args:
        geometry: the model at the video's size.
        stack: the memory policy.
        frames: latent frames of the video.
        batch: videos generated together.
        branches: guidance branches, 2 with classifier-free guidance.
        steps: denoising steps of a chunk.
        flops: operations of one forward, given query tokens and attended tokens.
        latents: what the cost of compressing latents depends on.

    Raises:
        InvalidOptionError: if a size is not positive, or a compressor's weights are missing or another model's.

    >>> import torch
    >>> from kvpack.plugins.registry import registry
    >>> wan = Geometry(30, 12, 128, (30, 52), (44, 42, 42), dtype=torch.bfloat16)
    >>> plan(wan, registry().stack("packforcing", {}), 480).attended_tokens
    27872
    """
    for name, value in (("frames", frames), ("batch", batch), ("branches", branches), ("steps", steps)):
        require_int(name, value, minimum=1)
    chunks = -(-frames // stack.chunk_frames)
    chunk_tokens = stack.chunk_frames * geometry.tokens_per_frame
    whole = replace(geometry, frames=frames)
    held = resident(whole, stack, chunks, batch, channels_of(latents))
    history = math.ceil(held.history)  # a mean, where heads attend unlike numbers
    archive, archived = list[int](), 0
    compressor_parameters: dict[str, int] = {}
    compressor_flops: dict[str, int] = {}
    if isinstance(stack, Stack):
        before = after = stack.ledger()
        # What the last chunk attends is what was held before it was committed.
        # Of a long video only as many chunks as it takes until what is held repeats.
        for _ in range(as_many(whole, stack, chunks, batch)):
            before, after = after, after.commit().ledger
        spans = (stack.compressor.span(each.first_frame, each.block_frames, geometry.grid) for each in after.archive)
        archive = [span.tokens for span in spans]
        shape = geometry.heads, geometry.head_dim, geometry.dtype
        archived = geometry.layers * sum(stored_bytes(stack.store, tokens, *shape) for tokens in archive)
        compressor_parameters, compressor_flops = _branches(geometry, stack, before, latents)
        if twin := _twin_flops(geometry, stack, before, history, flops):
            compressor_flops["twin"] = twin * branches  # each branch turns the tokens into keys and values of its own
    token_bytes = geometry.kv_bytes_per_token * batch * branches
    forward = flops(chunk_tokens, history + chunk_tokens) if flops else 0
    return Plan(
        stack=stack.name,
        chunks=chunks,
        frames=frames,
        branches=branches,
        chunk_tokens=chunk_tokens,
        attended_tokens=history + chunk_tokens,
        attended_kv_bytes=int(held.history * token_bytes),
        archive_blocks=len(archive),
        archive_tokens=sum(archive),
        archive_kv_bytes=archived * batch * branches,
        resident_kv_bytes=held.bytes(geometry.layers) * branches,
        workspace_kv_bytes=held.shared_bytes * branches,
        full_tokens=chunks * chunk_tokens,
        full_kv_bytes=chunks * chunk_tokens * token_bytes,
        kv_bytes_per_token=geometry.kv_bytes_per_token,
        flops_per_chunk=(steps + (stack.commit == "rerun")) * forward * batch * branches,  # a commit is a forward more
        compressor_parameters=compressor_parameters,
        compressor_flops={name: count * batch for name, count in compressor_flops.items()},
    )


def video_frames(seconds: float, fps: float, scale: int) -> tuple[int, int]:
    """Return pixel and latent frames of the longest video of at most `seconds` that a causal VAE can decode.

    Args:
        seconds: of the video.
        fps: pixel frames a second.
        scale: pixel frames of a latent frame (`Adapter.temporal_scale`).

    Raises:
        InvalidOptionError: if that is not even one frame.

    >>> video_frames(120, 16, 4)
    (1917, 480)
    """
    for name, value in (("seconds", seconds), ("fps", fps)):
        if not 0 < value < _MOST:
            given = f"{value:g}" if isinstance(value, float) else str(value)[:80]
            raise InvalidOptionError(f"{name} must be a number > 0, got {given}; at most {_MOST:g}")
    whole = math.floor(seconds * fps + 1e-6)  # 0.1 s at 30 fps is 3 frames, whatever a float makes of it
    if whole < 1:
        raise InvalidOptionError(f"seconds must be at least {1 / fps:g}, one frame at {fps:g} fps, got {seconds:g}")
    latent = (whole - 1) // scale + 1  # of a causal VAE the first latent frame is one frame, each later one `scale`
    return scale * (latent - 1) + 1, latent


def attended_tokens(geometry: Geometry, stack: Stack, ledger: Ledger) -> int:
    """Count the tokens of history that the chunk after `ledger` attends."""
    plan = StackPlan(stack, StackBook.of(ledger), stack.chunk_frames, geometry)
    sizes = [span.tokens for span in plan.attended]
    whole = sum(piece.frames for piece in ledger.whole)
    return whole * geometry.tokens_per_frame + sum(sizes[len(sizes) - plan.chosen :])


def _branches(
    geometry: Geometry, stack: Stack, ledger: Ledger, latents: LatentShape | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Count parameters and operations of each branch of a latent-space compressor, for one video."""
    parameters: dict[str, int] = {}
    flops: dict[str, int] = {}
    if not isinstance(stack.compressor, LatentCompressor) or latents is None:
        return parameters, flops
    stack.compressor.check(latents.channels, geometry.width, latents.patch, latents.native)
    for piece in ledger.compressed_pieces():
        for name, cost in stack.compressor.costs(piece.frames, geometry, latents).items():
            parameters[name] = cost.parameters
            flops[name] = flops.get(name, 0) + cost.flops
    return parameters, flops


def twin_tokens(geometry: Geometry, stack: Stack, ledger: Ledger) -> list[int]:
    """Count the tokens of each twin that a latent-space compressor makes of the chunk after `ledger`."""
    pieces = ledger.compressed_pieces() if isinstance(stack.compressor, LatentCompressor) else ()
    return [stack.compressor.span(each.first_frame, each.frames, geometry.grid).tokens for each in pieces]


def _twin_flops(
    geometry: Geometry, stack: Stack, ledger: Ledger, history: int, flops: Callable[[int, int], int] | None
) -> int:
    """Count the operations that turn a chunk's hidden tokens into keys and values, in one guidance branch."""
    tokens = twin_tokens(geometry, stack, ledger)
    if flops is None:
        return 0
    if isinstance(stack.compressor, LatentCompressor) and stack.compressor.project == "direct":
        return sum(tokens) * geometry.layers * 2 * 2 * geometry.width**2  # to_k and to_v
    return sum(flops(count, history + count) for count in tokens)
