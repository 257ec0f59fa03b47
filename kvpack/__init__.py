"""Packed key/value memory for causal video transformers on stock diffusers pipelines."""

from importlib.metadata import PackageNotFoundError, version

from diffusers import DiffusionPipeline

from kvpack.blocks import KVBlock, LatentChunk, Span
from kvpack.enable import disable, enable
from kvpack.errors import KVPackError
from kvpack.geometry import Geometry
from kvpack.hookspecs import hookimpl
from kvpack.memory import Attended, StateMemory, Tokens
from kvpack.roles import Compressor, LatentCompressor, Partitioner, Reindexer, Selector
from kvpack.scheduler import FlowMatchFewStepScheduler
from kvpack.session import Session
from kvpack.stack import Stack

try:
    __version__ = version("kvpack")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0"

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
