"""Packed key/value memory for causal video transformers on stock diffusers pipelines."""

from diffusers import DiffusionPipeline

from kvpack.errors import KVPackError
from kvpack.memory.base import Attended, StateMemory, Tokens
from kvpack.memory.blocks import KVBlock, LatentChunk, Span
from kvpack.memory.geometry import Geometry
from kvpack.memory.roles import Compressor, LatentCompressor, Partitioner, Reindexer, Selector
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
from kvpack.pipeline.enable import disable, enable
from kvpack.plugins.hookspecs import hookimpl
from kvpack.scheduler import FlowMatchFewStepScheduler
from kvpack.version import __version__ as __version__

__all__ = [
    "Attended",
    "Compressor",
    "FlowMatchFewStepScheduler",
    "Geometry",
    "KVBlock",
    "KVPackError",
    "LatentChunk",
    "LatentCompressor",
    "Partitioner",
    "Reindexer",
    "Selector",
    "Session",
    "Span",
    "Stack",
    "StateMemory",
    "Tokens",
    "disable",
    "enable",
    "hookimpl",
]

DiffusionPipeline.enable_packforcing = enable  # type: ignore[attr-defined]
DiffusionPipeline.disable_packforcing = disable  # type: ignore[attr-defined]
