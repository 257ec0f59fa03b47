"""A causal checkpoint of research code becomes a diffusers folder that kvpack needs no arguments for."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch

from kvpack.checkpoints import card
from kvpack.checkpoints.experts import require_one_in_index
from kvpack.checkpoints.hub import model_folder
from kvpack.checkpoints.lora import merge, read_lora
from kvpack.checkpoints.reading import NESTINGS, read_checkpoint
from kvpack.checkpoints.recipes import Recipe
from kvpack.checkpoints.text import read_config
from kvpack.errors import InvalidOptionError, OutputError, UnsupportedPipelineError

_INDEX = "model_index.json"
#: What a base without other parts lacks; they can be passed to `from_pretrained`.
_ALONE = {"_class_name": "WanPipeline", "text_encoder": [None, None], "tokenizer": [None, None], "vae": [None, None]}


def convert(
    source: Path,
    base: Path,
    output: Path,
    recipe: Recipe,
    rename: Callable[..., dict[str, Any]],
    build: Callable[..., Any],
    *,
    weights: str | None = None,
    lora: Path | None = None,
    lora_alpha: float | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert a checkpoint into a diffusers folder; on an error the output stays as it was.

    Args:
        source: checkpoint, a file or a folder of shards.
        base: diffusers folder of the same model, or of its transformer's config alone, or Hub id.
        output: folder to write.
        recipe: what the checkpoint was trained for.
        rename: gives weights by name their diffusers names.
        build: makes a model of weights and a config.
        weights: outermost key of the weights in the checkpoint; the recipe's, or the first known, if None.
        lora: LoRA to merge.
        lora_alpha: its strength; what its files say if None (see `Strength`).
        dtype: of the weights; the checkpoint's own if None.
        max_shard_size: bytes of a file, or a text such as "5GB".
        overwrite: whether an output that is there is replaced.

    Returns:
        The keys under which the weights were (`nesting`), how many `tensors` of how many `parameters` were converted
        and how many `merged` with a LoRA's delta, and the parts of the base that were `copied`, or are `absent` there.

    Raises:
        InvalidOptionError: if the checkpoint, the LoRA or the base is not what it must be, or the output is in the way.
        UnsupportedPipelineError: if the base has two transformers.
    """
    # Without its transformer's weights, which are replaced.
    folder_of_base = model_folder(base, "base", without=["transformer/*.safetensors", "*.bin"])
    index, config = _base(folder_of_base)
    _require_free(output, [source, folder_of_base, *([lora] if lora else [])], overwrite)
    prefer = (recipe.nesting,) if recipe.nesting else ()
    checkpoint = read_checkpoint(source, weights, (*prefer, *NESTINGS))
    tensors = rename(checkpoint.tensors)
    deltas = {}
    if lora is not None:
        deltas = read_lora(lora, lora_alpha, rename)
        tensors = merge(tensors, deltas, dtype)
    if dtype is not None:
        tensors = {name: each.to(dtype) for name, each in tensors.items()}  # those of a LoRA are rounded already, once
    model = build(tensors, config)
    _require_finite(tensors, source, dtype)
    # Nothing is written before all that can be wrong with the weights has been found.
    with _replacing(output) as folder:
        model.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
        recipe.scheduler.save_pretrained(folder / "scheduler")
        recipe.settings.write(folder)
        text = card.model_card(recipe, source, base, lora, output.resolve().name)
        (folder / card.FILE).write_text(text, encoding="utf-8")
        copied, absent = _copy_parts(folder_of_base, type(recipe.scheduler), folder, index)
    parameters = sum(each.numel() for each in model.parameters())
    counts = {"tensors": len(tensors), "parameters": parameters, "merged": len(deltas)}
    return {"nesting": checkpoint.nesting, **counts, "copied": copied, "absent": absent}


def _require_finite(weights: dict[str, Any], source: Path, dtype: torch.dtype | None) -> None:
    """Raise `InvalidOptionError` if a weight is not finite; the least and the greatest tell, without a copy of it."""
    bad = [name for name, each in weights.items() if each.numel() and not torch.stack(each.aminmax()).isfinite().all()]
    if bad:
        cause = "it is broken" if dtype is None else f"it is broken, or {dtype} is too small for it"
        raise InvalidOptionError(
            f"{len(bad)} weights of {source} hold NaN or infinity, first {bad[0]}: {cause}; give another"
        )


def _base(base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the base's model index and its transformer's config."""
    index = read_config(base / _INDEX) if (base / _INDEX).is_file() else dict(_ALONE)
    require_one_in_index(base, index)
    if index.get("_class_name") != _ALONE["_class_name"]:
        raise UnsupportedPipelineError(
            f"{base} is a {index.get('_class_name')}, but what is converted is run by a {_ALONE['_class_name']}; "
            "give a base of that class, e.g. Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    places = [base / "transformer/config.json", base / "config.json"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InvalidOptionError(f"{base} has neither transformer/config.json nor config.json")
    return index, read_config(found)


def _copy_parts(
    base: Path, scheduler: type, folder: Path, index: dict[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copy all parts but the transformer and the scheduler, and write the model index."""
    # Where from_pretrained imports it from.
    library = "diffusers" if hasattr(diffusers, scheduler.__name__) else scheduler.__module__
    own = {"transformer": ["diffusers", "WanTransformer3DModel"], "scheduler": [library, scheduler.__name__]}
    parts = [name for name, value in index.items() if isinstance(value, list) and name not in (*own, "transformer_2")]
    there = [name for name in parts if (base / name).is_dir()]
    for name in there:
        part = base / name
        # A model's folder holds its config alone where no more was downloaded.
        if (part / "config.json").is_file() and not [*part.glob("*.safetensors"), *part.glob("*.bin")]:
            told = f"{part} holds a config and no weights"
            raise InvalidOptionError(f"{told}; download the whole base, or give another one")
        shutil.copytree(part, folder / name)
    (folder / _INDEX).write_text(json.dumps(dict(sorted({**index, **own}.items())), indent=2) + "\n", encoding="utf-8")
    return tuple(there), tuple(name for name in parts if name not in there)


def _require_free(output: Path, read: Iterable[Path], overwrite: bool) -> None:
    for needed in read:
        if needed.resolve().is_relative_to(output.resolve()):
            raise InvalidOptionError(f"the output {output} holds {needed}, which is read; give another folder")
    if output.exists() and not output.is_dir():
        raise OutputError(f"the output {output} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(f"the output {output} is not empty; give another folder or --overwrite")


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output` that replaces it at the end, unless an error is raised."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that both renames stay on one file system, where they cannot stop halfway.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as staging:
        new, old = Path(staging) / "new", Path(staging) / "old"
        new.mkdir()
        yield new
        if output.exists():  # two renames, since one onto a folder that is not empty fails
            output.rename(old)
        try:
            new.rename(output)
        except BaseException:
            if old.exists():
                old.rename(output)
            raise
