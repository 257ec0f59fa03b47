"""Packed key/value memory for causal video transformers on stock diffusers pipelines."""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from kvpack import logging as logging
from kvpack.errors import KVPackError as KVPackError
from kvpack.version import __version__ as __version__

if TYPE_CHECKING:
    from kvpack.memory.base import Attended, StateMemory
    from kvpack.memory.blocks import KVBlock, LatentChunk, Span
    from kvpack.memory.geometry import Geometry
    from kvpack.memory.roles import Compressor, LatentCompressor, Partitioner, Reindexer, Selector
    from kvpack.memory.session import Session
    from kvpack.memory.stack import Stack
    from kvpack.memory.tokens import Tokens
    from kvpack.pipeline.enable import disable, enable
    from kvpack.plugins.hookspecs import hookimpl
    from kvpack.scheduler import FlowMatchFewStepScheduler

#: Modules of the public names, imported when one is first used: torch and diffusers take seconds.
_MODULES = {
    **dict.fromkeys(("Attended", "StateMemory"), "memory.base"),
    **dict.fromkeys(("KVBlock", "LatentChunk", "Span"), "memory.blocks"),
    "Geometry": "memory.geometry",
    **dict.fromkeys(("Compressor", "LatentCompressor", "Partitioner", "Reindexer", "Selector"), "memory.roles"),
    "Session": "memory.session",
    "Stack": "memory.stack",
    "Tokens": "memory.tokens",
    **dict.fromkeys(("disable", "enable"), "pipeline.enable"),
    "hookimpl": "plugins.hookspecs",
    "FlowMatchFewStepScheduler": "scheduler",
}

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


class _Method:
    """A method of `DiffusionPipeline` that is imported when it is first looked up, and then stands there itself."""

    def __init__(self, owner: type, name: str, function: str) -> None:
        self.owner, self.name, self.function = owner, name, function

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        function = __getattr__(self.function)
        setattr(self.owner, self.name, function)
        return function.__get__(instance, owner)


def _add_methods(pipeline_class: type) -> None:
    for name, function in (("enable_packforcing", "enable"), ("disable_packforcing", "disable")):
        setattr(pipeline_class, name, _Method(pipeline_class, name, function))


class _WhenImported(MetaPathFinder):
    """Adds the two methods as soon as diffusers' base class is imported, and is gone then."""

    module = "diffusers.pipelines.pipeline_utils"

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return the module's own spec, whose loader adds the methods at its end."""
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                _add_methods(module.DiffusionPipeline)

            loader.exec_module = exec_module
        return spec


if _WhenImported.module in sys.modules:
    _add_methods(sys.modules[_WhenImported.module].DiffusionPipeline)
else:
    sys.meta_path.insert(0, _WhenImported())
