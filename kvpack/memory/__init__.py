"""Keys and values of a generation: policies, geometry and the engine that holds them."""

from kvpack.memory.base import Attended, Chunk, Commit, Event, Memory, StateMemory
from kvpack.memory.tokens import Tokens, consecutive, shortened

__all__ = [
    "Attended",
    "Chunk",
    "Commit",
    "Event",
    "Memory",
    "StateMemory",
    "Tokens",
    "consecutive",
    "shortened",
]
