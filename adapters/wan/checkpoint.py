"""Wan's original checkpoints as diffusers transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from kvpack.errors import InvalidOptionError


def diffusers_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return weights by their diffusers names; those that have them already keep them."""
    if any(".attn1." in name or name.startswith("condition_embedder.") for name in weights):
        return dict(weights)
    return convert_wan_transformer_to_diffusers(dict(weights))  # empties the dict that it is given


def transformer(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> WanTransformer3DModel:
    """Return a transformer around the weights, which are not copied.

    Raises:
        InvalidOptionError: if names or shapes are not those of this transformer.
    """
    if config.get("_class_name", "WanTransformer3DModel") != "WanTransformer3DModel":
        raise InvalidOptionError(
            f"the base's config is of a {config['_class_name']}, not of a WanTransformer3DModel; "
            "give a diffusers folder, e.g. of Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    with torch.device("meta"):  # no memory for numbers that assign=True replaces
        model: Any = WanTransformer3DModel.from_config(dict(config))
    _require_same(weights, model.state_dict())  # before: torch's own error lists every key
    model.load_state_dict({name: each.contiguous() for name, each in weights.items()}, assign=True)
    return model.eval()


def _require_same(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing, unexpected = ([*filter(lambda name: name not in b, a)] for a, b in ((wanted, weights), (weights, wanted)))
    if missing or unexpected:
        raise InvalidOptionError(
            f"not a layout that is known for this transformer: {_first('missing', missing)}; "
            f"{_first('unexpected', unexpected)}"
        )
    for name, tensor in wanted.items():
        if weights[name].shape != tensor.shape:
            raise InvalidOptionError(
                f"{name} is {[*weights[name].shape]} in the checkpoint and {[*tensor.shape]} in the base's config; "
                "give the base of the same size"
            )


def _first(kind: str, names: Sequence[str]) -> str:
    return f"{len(names)} {kind} keys" + (f", first {', '.join(names[:5])}" if names else "")
