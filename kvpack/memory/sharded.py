"""Policies where heads are on several processes: who is given those of all, and who is refused."""

from dataclasses import replace

from kvpack.errors import UnsupportedPipelineError
from kvpack.memory.base import Memory
from kvpack.memory.blocks import KVBlock
from kvpack.memory.geometry import Geometry
from kvpack.memory.roles import Compressor


def with_all_heads(compressor: Compressor, geometry: Geometry, block: KVBlock) -> KVBlock:
    """Return a block with the heads of all processes, unless a compressor does well with those of one."""
    if compressor.by_head or geometry.shard is None:
        return block
    queries = None if block.queries is None else geometry.all_heads(block.queries)
    span, keys = block.span, geometry.all_heads(block.keys)
    if span.coordinates.ndim == 4:
        span = replace(span, coordinates=geometry.all_heads(span.coordinates))
    return replace(block, keys=keys, values=geometry.all_heads(block.values), span=span, queries=queries)


def with_own_heads(compressor: Compressor, geometry: Geometry, block: KVBlock) -> KVBlock:
    """Return this process's heads of what a compressor made of a block of `with_all_heads`."""
    if compressor.by_head or geometry.shard is None:
        return block
    span, keys = block.span, geometry.own_heads(block.keys)
    if span.coordinates.ndim == 4:
        span = replace(span, coordinates=geometry.own_heads(span.coordinates))
    return replace(block, keys=keys, values=geometry.own_heads(block.values), span=span, queries=None)


def require_by_head(memory: Memory) -> None:
    """Raise `UnsupportedPipelineError` if a memory cannot have its heads on several processes."""
    codec = getattr(memory, "store", None)
    # Of a stack only the codec must do so: its other policies are given the heads of all processes.
    wanting = codec if memory.composite and codec is not None else memory
    if not wanting.by_head:
        raise UnsupportedPipelineError(
            f"{wanting.role} {wanting.name} does not say that it works on some heads as on all, which context "
            "parallelism needs; sum over heads by chunk.sum_heads and set by_head = True in its class, or take the "
            "transformer as it is without enable_parallelism()"
        )
