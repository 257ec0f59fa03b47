"""What is compared: memories by name and options, and references that no memory makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from kvpack import memory
from kvpack.memory.stack import Stack
from kvpack.plugins.registry import registry
from kvpack.shipped import STACK_OPTIONS, shipped_compressor

# What the toy pipeline was trained with; given to every factory that takes it.
SIZES = {"chunk_frames": 4, "train_frames": 20}
# Option of a stack's factory -> role of the policy that it takes.
ROLES = {"compressor": "compressor", "selector": "selector", "reindexer": "reindexer"}
# Generated without a memory, see `sources.reference`.
REFERENCES = ("truth", "shuffled", "frozen", "noise")
HERO = "packforcing"
# The same with the compressor that was trained for the shipped pipeline.
TRAINED = "packforcing, trained dual"
POOLED = "packforcing, pool"
COMPARED = (HERO, POOLED, TRAINED)


@dataclass(frozen=True)
class ChoosingAtEachStep(Stack):
    """A stack that chooses in every forward, not once a chunk."""

    every_step: ClassVar[bool] = True


@dataclass(frozen=True)
class Memory:
    """A memory as plain data.

    Args:
        name: what tables call it.
        factory: name of an installed stack.
        options: of its factory; a policy with options of its own is a mapping `{"policy": name, ...}`.
        every_step: whether it chooses at each step.
    """

    name: str
    factory: str
    options: Mapping[str, Any] = field(default_factory=dict)
    every_step: bool = False

    def stack(self) -> memory.Memory:
        """Return the stack, at the sizes of the toy pipeline.

        Raises:
            UnknownNameError: if the stack, an option or a policy isn't there.
            InvalidOptionError: if an option is wrong.
        """
        options = {option: _policy(option, value) for option, value in self.options.items()}
        made = registry().stack(self.factory, options, registry().taken(self.factory, SIZES))
        return ChoosingAtEachStep(**_options(made)) if self.every_step else made


def _options(stack: memory.Memory) -> dict[str, Any]:
    return {each.name: getattr(stack, each.name) for each in fields(stack)}  # type: ignore[arg-type]  # it is one


def _policy(option: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return registry().policy(ROLES[option], value["policy"], {k: v for k, v in value.items() if k != "policy"})


# At packforcing's budget or above: with the current chunk it attends the tokens of 18 latent frames, a window of 20.
RIVALS = (
    Memory("window with sink 4", "self-forcing", {"window_frames": 20, "sink_frames": 4}),
    Memory(
        "window with sink 4, contiguous",
        "self-forcing",
        {"window_frames": 20, "sink_frames": 4, "reindexer": "contiguous"},
    ),
    Memory("sink 8 + recent 4", "packforcing", {"topk": 0}),
    # The newest blocks instead of those that the queries ask for, and more tokens of more blocks.
    Memory("packforcing, newest blocks", "packforcing", {"keep_tokens": 8, "topk": 4, "selector": "recency"}),
    Memory("packforcing, 16 tokens of 8", "packforcing", {"keep_tokens": 16, "topk": 8}),
    *(
        Memory(f"packforcing, {words}", "packforcing", {"keep_tokens": 8, "topk": 4, **options})
        for words, options in (
            ("int8", {"store": "int8"}),
            ("int4", {"store": "int4"}),
            ("one choice for all layers", {"share_selection": True}),
            ("unbounded archive", {"archive_blocks": None}),
            ("spread archive", {"eviction": "spread"}),
        )
    ),
    Memory("packforcing, choosing at each step", "packforcing", {"keep_tokens": 8, "topk": 4}, every_step=True),
    # Blocks of two tokens that are means: 16 of them are the same number of attended tokens.
    Memory(POOLED, "packforcing", {"compressor": "pool", "selector": "topk"}),
    Memory("packforcing, lr", "packforcing", {"compressor": "lr", "selector": "topk"}),
    Memory(TRAINED, "packforcing", {"compressor": str(shipped_compressor()), "selector": "topk"}),
)


def memories() -> tuple[Memory, ...]:
    """Return every installed stack, and variants of some."""
    return (*collection(), *RIVALS)


def collection() -> tuple[Memory, ...]:
    """Return every installed stack under its own name, at sizes that the toy pipeline can use."""
    return tuple(Memory(name, name, STACK_OPTIONS.get(name, {})) for name in registry().names("stack"))
