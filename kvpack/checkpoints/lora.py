"""Low-rank deltas merged into weights, exactly: one rounding of the exact sum."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpack.checkpoints.reading import NESTINGS, read_checkpoint
from kvpack.errors import InvalidOptionError

_FACTOR = re.compile(r"(?P<module>.+?)\.lora_(?P<factor>A|B|down|up)(\.\w+)?\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")


@dataclass
class LowRank:
    """The delta `alpha / rank * up @ down` of one weight (LoRA, arXiv 2106.09685).

    Args:
        factors: "down" `[rank, in]` and "up" `[out, rank]`.
        alpha: its strength; the rank if None.
    """

    factors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None

    def merged(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight with the delta added, computed in float64 and rounded once."""
        up, down = (self.factors[each].double() for each in ("up", "down"))
        scale = 1.0 if self.alpha is None else self.alpha / down.shape[0]
        return rounded(weight.double() + scale * (up @ down), dtype)


def read_lora(
    path: Path, alpha: float | None, rename: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, LowRank]:
    """Read the deltas of a LoRA, by the diffusers name of the weight that each belongs to.

    Args:
        path: file, possibly nested under `generator_lora`, or folder of PEFT.
        alpha: strength of all deltas; what the file or an `adapter_config.json` beside it says if None, else the rank.
        rename: gives weights by name their diffusers names.

    Raises:
        InvalidOptionError: if a key is no LoRA's, or half of a pair is missing.
    """
    tensors = read_checkpoint(path, nestings=("generator_lora", *NESTINGS)).tensors
    found: dict[str, LowRank] = {}
    for key, tensor in tensors.items():
        factor, strength = _FACTOR.fullmatch(key), _ALPHA.fullmatch(key)
        match = factor or strength
        if match is None:
            raise InvalidOptionError(
                f"{path} has {key}, which is no LoRA's; it needs ...lora_A.weight, ...lora_B.weight"
            )
        delta = found.setdefault(match["module"], LowRank())
        if factor is None:
            delta.alpha = float(tensor)
        else:
            side = {"A": "down", "B": "up"}.get(factor["factor"], factor["factor"])
            if side in delta.factors:
                raise InvalidOptionError(f"{path} has two adapters for {match['module']}; give a file with one")
            delta.factors[side] = tensor
    shared = _configured_alpha(path) if alpha is None else alpha
    for module, delta in found.items():
        _require_pair(path, module, delta)
        delta.alpha = delta.alpha if alpha is None and delta.alpha is not None else shared
    return {name: found[module] for name, module in rename({f"{module}.weight": module for module in found}).items()}


def merge(weights: Mapping[str, Tensor], deltas: Mapping[str, LowRank], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the weights with their deltas added.

    Args:
        weights: by diffusers name.
        deltas: the same.
        dtype: what merged weights are rounded to; each weight's own if None.

    Raises:
        InvalidOptionError: if a delta has no weight, or not its shape.
    """
    unmatched = sorted(set(deltas) - set(weights))
    if unmatched:
        raise InvalidOptionError(
            f"{len(unmatched)} of {len(deltas)} LoRA deltas belong to no weight of the checkpoint, "
            f"e.g. {', '.join(unmatched[:5])}"
        )
    merged = dict(weights)
    for name, delta in deltas.items():
        weight, shape = weights[name], (delta.factors["up"].shape[0], delta.factors["down"].shape[1])
        if tuple(weight.shape) != shape:
            raise InvalidOptionError(f"the LoRA delta of {name} is {shape}, but the weight is {tuple(weight.shape)}")
        merged[name] = delta.merged(weight, dtype or weight.dtype)
    return merged


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to the nearest value of `dtype`; torch itself rounds 16-bit floats twice, by way of float32."""
    if dtype.itemsize > 2:
        return exact.to(dtype)
    single = exact.float()
    single = torch.where(single.abs() > exact.abs(), single.nextafter(torch.zeros_like(single)), single)
    # To odd: a last bit that says that something follows keeps the second rounding from seeing a tie.
    return (single.view(torch.int32) | (single.double() != exact).int()).view(torch.float32).to(dtype)


def _require_pair(path: Path, module: str, delta: LowRank) -> None:
    if set(delta.factors) != {"up", "down"}:
        raise InvalidOptionError(f"{path} has half of a LoRA pair for {module}: {', '.join(delta.factors) or 'alpha'}")
    up, down = delta.factors["up"], delta.factors["down"]
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise InvalidOptionError(
            f"the LoRA pair of {module} must be [rank, in] and [out, rank], got {[*down.shape]}, {[*up.shape]}"
        )


def _configured_alpha(path: Path) -> float | None:
    """Return the alpha in PEFT's config beside the file."""
    config = (path if path.is_dir() else path.parent) / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
        special = [name for name in ("use_rslora", "use_dora", "fan_in_fan_out", "alpha_pattern") if data.get(name)]
        alpha = None if data.get("lora_alpha") is None else float(data["lora_alpha"])
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidOptionError(f"{config} is not PEFT's: {error}") from error
    if special:
        raise InvalidOptionError(f"{config} asks for {', '.join(special)}, which is not merged; merge it with PEFT")
    return alpha
