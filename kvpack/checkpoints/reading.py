"""Weights out of a checkpoint's file or folder, whatever they are wrapped in."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from kvpack.checkpoints.archive import is_archive
from kvpack.checkpoints.pickled import require_modest
from kvpack.checkpoints.text import read_json
from kvpack.errors import InvalidOptionError, first_line

#: Where a checkpoint keeps the generator's weights: the first of these that is there, again and again.
NESTINGS = ("generator_ema", "generator", "model", "state_dict")
#: Endings of files that are read.
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
#: Bytes that weights may take beyond twice those of their files, for a number such as alpha in the place of a tensor.
_SPARE = 1 << 20
#: What wrappers put into names, anywhere, and in front of them.
_INNER = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "module"}
_OUTER = {"model", "diffusion_model", "base_model", "generator", "transformer"}


@dataclass(frozen=True)
class Checkpoint:
    """Weights by name, without the prefixes of wrappers.

    Args:
        tensors: the weights, still in their file where it can be mapped into memory.
        nesting: the keys under which they were, outermost first.
    """

    tensors: dict[str, Tensor]
    nesting: tuple[str, ...]


def read_checkpoint(source: Path, weights: str | None = None, nestings: Sequence[str] = NESTINGS) -> Checkpoint:
    """Read `.safetensors`, `.pt`, `.pth`, `.bin`, `.ckpt`, or a folder of shards; no code from a file is run.

    Args:
        source: file or folder.
        weights: the outermost key to take, e.g. "generator"; the first of `nestings` if None.
        nestings: keys to look under, the preferred one first.

    Raises:
        InvalidOptionError: if it is no checkpoint, holds more than tensors, or its weights are quantised.
    """
    data, nesting = _unnested(_load(source), source, weights, nestings)
    tensors: dict[str, Tensor] = {}
    for key, value in data.items():
        name = bare_name(key)
        if name.endswith(".alpha") and isinstance(value, Tensor | int | float):
            value = torch.as_tensor(value, dtype=torch.float64)  # a LoRA's strength, often a whole number
        if isinstance(value, Tensor) and _is_weight(name, value):
            if name in tensors:
                raise InvalidOptionError(f"{source} has two weights for {name}, one of them {key}")
            tensors[name] = value
    if not tensors:
        raise InvalidOptionError(f"{source} holds no tensors but {_listed(data)}; choose where with --weights KEY")
    _require_floats(tensors, source)
    _require_own(tensors, source)
    return Checkpoint(tensors, nesting)


def header(source: Path) -> dict[str, str]:
    """Return what the headers of a checkpoint's safetensors files say beside their tensors."""
    told: dict[str, str] = {}
    for path in _shards(source) if source.is_dir() else [source]:
        if path.suffix == ".safetensors":
            _require_short_header(path)
            with safe_open(path, framework="pt") as file:
                told |= file.metadata() or {}
    return told


def bare_name(key: str) -> str:
    """Return a weight's name without what FSDP, `torch.compile`, DDP and other wrappers put around it.

    >>> bare_name("model._fsdp_wrapped_module.blocks.0._orig_mod.ffn.0.weight")
    'blocks.0.ffn.0.weight'
    """
    parts = [part for part in key.split(".") if part not in _INNER]
    while len(parts) > 1 and parts[0] in _OUTER:  # the last part stays, whatever it is called
        del parts[0]
    return ".".join(parts)


def _unnested(
    data: Mapping[str, Any], source: Path, weights: str | None, nestings: Sequence[str]
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    taken = []
    if weights is not None:
        inner = _inside(data, weights)
        if inner is None:
            raise InvalidOptionError(f"{source} has no weights {weights!r}; it holds {_listed(data)}")
        data, taken = inner, [weights]
    # Trainers nest more than once, e.g. {"generator": {"model": weights}}.
    while key := next((key for key in nestings if _inside(data, key) is not None), None):
        data = _inside(data, key) or {}
        taken.append(key)
    return data, tuple(taken)


def _inside(data: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """Return what is nested under a key, or None; a safetensors file nests by prefixes of its names only."""
    if isinstance(data.get(key), Mapping):
        return dict(data[key])
    if key == "model":  # a prefix like any other
        return None
    return {name.removeprefix(f"{key}."): data[name] for name in data if name.startswith(f"{key}.")} or None


def _is_weight(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor is a number of the model, and not a counter, a mask or a table beside its weights."""
    return tensor.is_floating_point() or re.search(r"(^|\.)q?weight(_packed)?$|\.bias$", name) is not None


def _require_floats(tensors: Mapping[str, Tensor], source: Path) -> None:
    wrong = {name: each.dtype for name, each in tensors.items() if not each.is_floating_point() or each.itemsize < 2}
    if wrong:
        name, dtype = next(iter(wrong.items()))
        raise InvalidOptionError(
            f"{source} is quantised: {len(wrong)} of its weights are not of 16 bits or more, e.g. {name} of {dtype}; "
            "give the checkpoint in bfloat16, float16 or float32"
        )


def _require_own(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse weights that are one stretch of the file again and again: what is done to them makes memory of each."""
    needed = sum(each.nbytes for each in tensors.values())
    given = sum(path.stat().st_size for path in (_shards(source) if source.is_dir() else [source]))
    if needed > 2 * given + _SPARE:
        raise InvalidOptionError(
            f"{source} has {given} bytes, but its weights would take {needed}; it is no checkpoint"
        )


def _load(source: Path) -> Mapping[str, Any]:
    if not source.is_dir():
        return _load_file(source)
    merged: dict[str, Any] = {}
    for path in _shards(source):
        part = _load_file(path)
        if twice := next((key for key in part if key in merged), None):
            raise InvalidOptionError(f"two files of {source} hold {twice}; name one file instead of the folder")
        merged.update(part)
    return merged


def _shards(folder: Path) -> list[Path]:
    # A folder may hold the weights twice, as safetensors and pickled: its safetensors are taken.
    for index in sorted(folder.glob("*.index.json"), key=lambda path: ".safetensors." not in path.name):
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidOptionError(f"{index} is not the index of a sharded checkpoint: {error!r}") from error
        # A stranger's index reads no file elsewhere.
        if wrong := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise InvalidOptionError(f"{index} names {str(wrong[0])[:80]!r}, which is no file beside it")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise InvalidOptionError(f"{index} names {len(missing)} files that are not there, e.g. {missing[0]}")
        return [folder / name for name in names]
    for suffix in SUFFIXES:
        if found := sorted(folder.glob(f"*{suffix}")):
            return found
    raise InvalidOptionError(f"no checkpoint in {folder}; it needs files in {', '.join(SUFFIXES)}")


def _load_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InvalidOptionError(f"no checkpoint {path}; give a file or a folder of shards")
    if path.suffix not in SUFFIXES:
        raise InvalidOptionError(f"{path} is none of {', '.join(SUFFIXES)}")
    mapped = is_archive(path)  # files of old torch cannot be mapped
    try:
        if path.suffix == ".safetensors":
            _require_short_header(path)
            return load_file(path)
        require_modest(path)
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except InvalidOptionError:
        raise
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise InvalidOptionError(f"{path} is not a whole checkpoint: {first_line(error)}") from error
    except Exception as error:  # unpickling refuses in several ways
        if not mapped:
            raise InvalidOptionError(f"{path} is no checkpoint, or not a whole one: no archive of torch") from error
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise InvalidOptionError(
            f"{path} holds more than tensors{f', e.g. a {found[1]}' if found else ''}. Reading the rest would run "
            "code from the file, which kvpack never does; where you trust it, save its state dict alone"
        ) from error
    if not isinstance(data, Mapping):
        raise InvalidOptionError(f"{path} must hold weights by name, got a {type(data).__name__}")
    return data


def _require_short_header(path: Path) -> None:
    """Refuse a safetensors file that is nearly all header: of each tensor that it lists Python makes a kilobyte."""
    with open(path, "rb") as file:
        announced, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
    if announced > _SPARE + size // 32:
        raise InvalidOptionError(f"{path} is not a whole checkpoint: of its {size} bytes the header has {announced}")


def _listed(names: Iterable[object]) -> str:
    texts = [str(name) for name in names]
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "") or "nothing"
