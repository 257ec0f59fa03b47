"""The pipeline and the compressor that come with kvpack, and what they were trained with."""

from importlib import resources
from pathlib import Path
from typing import Any

from kvpack.compressors.network import CONFIG_FILE
from kvpack.errors import InvalidOptionError
from kvpack.memory.base import Memory
from kvpack.plugins.registry import registry

# What the shipped pipeline was trained with.
FPS = 16
CALL = {"height": 64, "width": 64, "guidance_scale": 1.0, "max_sequence_length": 16}
TRAINING = {"chunk_frames": 4, "train_frames": 20}
#: Published sizes that do not go with chunks of four frames, or not with a model of twenty.
STACK_OPTIONS: dict[str, dict[str, Any]] = {
    # A frame has 16 tokens: 1/32 of a block would be two of them.
    "packforcing": {"keep_tokens": 8, "topk": 4},
    # It rolls a window of the training length and keeps no sink.
    "self-forcing": {"window_frames": 20, "sink_frames": 0},
    "deep-forcing": {"window_frames": 20},
    "framepack": {"reindexer": "fit"},
    "infinite-forcing": {"window_frames": 8},
    "infinity-rope": {"window_frames": 8},
    "krea": {"context_frames": 4},
    "longlive-rag": {"window_frames": 13},
    # Of two layers, one has the whole window.
    "mixed-windows": {"windows": (12, 20), "sinks": (4,), "shares": ((0,), (1,))},
    "magi": {"previous_chunks": (4, 3, 2, 1)},
    "rolling-sink": {"window_frames": 20},
    "token-trim": {"window_frames": 20},
}


def shipped_folder() -> Path:
    """Return the folder of the pipeline that is part of this package.

    Raises:
        InvalidOptionError: if it was not installed with it.
    """
    return _shipped("toyworld", "model_index.json")


def shipped_compressor() -> Path:
    """Return the folder of the compressor trained for that pipeline, for `enable_packforcing(compressor=...)`.

    Raises:
        InvalidOptionError: if it was not installed with it.
    """
    return _shipped("compressor", CONFIG_FILE)


def _shipped(name: str, needed: str) -> Path:
    folder = Path(str(resources.files("kvpack"))) / "data" / name
    if not (folder / needed).is_file():
        raise InvalidOptionError(f"{folder} with {needed} is not in this installation; install kvpack anew")
    return folder


def demo_stack(name: str, **given: Any) -> Memory:
    """Return an installed stack with the sizes that the shipped pipeline was trained with, and the options given.

    Raises:
        UnknownNameError: if it is not installed.
        InvalidOptionError: if an option is unknown or wrong.
    """
    return registry().stack(name, given, {**registry().taken(name, TRAINING), **STACK_OPTIONS.get(name, {})})
