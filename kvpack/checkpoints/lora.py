"""A LoRA's deltas merged into weights, exactly: one rounding of the exact sum."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpack.checkpoints.reading import NESTINGS, read_checkpoint
from kvpack.checkpoints.strength import Strength
from kvpack.errors import InvalidOptionError

#: Factors and biases as PEFT, kohya's trainers and older diffusers name them.
_FACTOR = re.compile(
    r"(?P<module>.+?)\.lora(?:_linear_layer\.|\.|_)(?P<factor>A|B|down|up)(?:\.\w+)?\.(?P<kind>weight|bias)"
)
_SIDES = {"A": "down", "B": "up"}
#: What is added, as it is, to a module's weight, to its bias, or to a block's modulation.
_WHOLE = re.compile(r"(?P<module>.+)\.(?P<kind>diff|diff_b|diff_m)")
_TARGETS = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
#: Names of modules as kohya's trainers flatten them.
_FLAT = re.compile(r"lora_unet_blocks_(\d+)_(?:(self_attn|cross_attn|ffn)_)?")


@dataclass(frozen=True)
class Delta:
    """What is added to one weight: `scale * up @ down` (LoRA, arXiv 2106.09685), or `scale * whole`, e.g. of a bias.

    Args:
        factors: "down" `[rank, in, ...]` and "up" `[out, rank, ...]`, where a convolution's have its kernel behind; or
            "whole", in the shape of the weight.
        scale: strength, e.g. alpha / rank.
    """

    factors: Mapping[str, Tensor]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        if "whole" in self.factors:
            return tuple(self.factors["whole"].shape)
        return (self.factors["up"].shape[0], *self.factors["down"].shape[1:])

    def merged(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight with the delta added, computed in float64 and rounded once."""
        # In float64 a product of two 16-bit numbers is exact, and so is nearly every sum of them.
        exact = {name: each.double() for name, each in self.factors.items()}
        if "whole" not in exact:  # [out, rank] @ [rank, in]
            exact["whole"] = (exact["up"].flatten(1) @ exact["down"].flatten(1)).view(self.shape)
        return rounded(weight.double() + self.scale * exact["whole"], dtype)


@dataclass
class _Module:
    """What a file says of one module's low-rank delta."""

    factors: dict[str, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None
    alpha: float | None = None


def read_lora(path: Path, alpha: float | None, rename: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Delta]:
    """Read the deltas of a LoRA, by the diffusers name of the weight that each belongs to.

    Keys are those of PEFT, diffusers and kohya's trainers (`lora_up`, `lora_unet_...`), and `diff`, `diff_b`, `diff_m`.
    Differs from diffusers, which drops what such keys add to norms, modulations and embeddings: it is merged too.

    Args:
        path: file, possibly nested under `generator_lora`, or folder of PEFT.
        alpha: strength of all low-rank deltas; what the file says if None (see `Strength`).
        rename: gives weights by name their diffusers names.

    Raises:
        InvalidOptionError: if a key is no LoRA's, half of a pair is missing, or the strength is not known for sure.
    """
    modules, deltas = _sorted(path, read_checkpoint(path, nestings=("generator_lora", *NESTINGS)).tensors)
    strength = Strength.read(path, alpha)
    strength.require_quick(modules)
    for name, module in modules.items():
        _require_pair(path, name, module)
        scale = strength.scale(name, module.factors["down"].shape[0], module.alpha)
        _put(path, deltas, f"{name}.weight", Delta(module.factors, scale))
        if module.bias is not None:
            _put(path, deltas, f"{name}.bias", Delta({"whole": module.bias}, scale))
    return rename(deltas)


def merge(weights: Mapping[str, Tensor], deltas: Mapping[str, Delta], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the weights with their deltas added, both by diffusers name, and rounded to `dtype`, or each to its own.

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
        weight = weights[name]
        if tuple(weight.shape) != delta.shape:
            raise InvalidOptionError(
                f"the LoRA delta of {name} is {delta.shape}, but the weight is {tuple(weight.shape)}"
            )
        merged[name] = delta.merged(weight, dtype or weight.dtype)
    return merged


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to the nearest value of `dtype`; torch itself rounds 16-bit floats twice, by way of float32."""
    if dtype.itemsize > 2:  # float32 is rounded to at once
        return exact.to(dtype)
    single = exact.float()
    single = torch.where(single.abs() > exact.abs(), single.nextafter(torch.zeros_like(single)), single)
    # To odd: a last bit that says that something follows keeps the second rounding from seeing a tie.
    return (single.view(torch.int32) | (single.double() != exact).int()).view(torch.float32).to(dtype)


def _sorted(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, _Module], dict[str, Delta]]:
    """Return low-rank deltas by module, and those that are stated as a whole by weight."""
    modules: dict[str, _Module] = {}
    wholes: dict[str, Delta] = {}
    for key, tensor in tensors.items():
        dotted = _FLAT.sub(lambda flat: f"blocks.{flat[1]}." + (f"{flat[2]}." if flat[2] else ""), key)
        if match := _FACTOR.fullmatch(dotted):
            _add_factor(path, modules.setdefault(match["module"], _Module()), match, tensor)
        elif match := _WHOLE.fullmatch(dotted):
            # A modulation is a parameter, and not the weight of a module.
            itself = match["kind"] == "diff" and match["module"].endswith(("modulation", "scale_shift_table"))
            name = match["module"] if itself else f"{match['module']}.{_TARGETS[match['kind']]}"
            _put(path, wholes, name, Delta({"whole": tensor}))
        elif match := _ALPHA.fullmatch(dotted):
            if tensor.numel() != 1 or not bool(tensor.isfinite().all()):
                got = f"a tensor {tuple(tensor.shape)}"
                raise InvalidOptionError(f"{path} has {key}, which must be one number, got {got}")
            modules.setdefault(match["module"], _Module()).alpha = float(tensor)
        else:
            raise InvalidOptionError(
                f"{path} has {key}, which is no LoRA's; it needs ...lora_A.weight, ...lora_B.weight"
            )
    return modules, wholes


def _add_factor(path: Path, module: _Module, match: re.Match[str], tensor: Tensor) -> None:
    side = _SIDES.get(match["factor"], match["factor"])
    if (side, match["kind"]) == ("up", "bias"):
        module.bias = tensor
    elif match["kind"] == "bias":
        raise InvalidOptionError(f"{path} has {match[0]}; a LoRA has a bias behind its second factor only")
    elif side in module.factors:
        raise InvalidOptionError(f"{path} has two adapters for {match['module']}; give a file with one")
    else:
        module.factors[side] = tensor


def _put(path: Path, deltas: dict[str, Delta], name: str, delta: Delta) -> None:
    if name in deltas:
        raise InvalidOptionError(f"{path} has two deltas for {name}; give a file with one")
    deltas[name] = delta


def _require_pair(path: Path, name: str, module: _Module) -> None:
    if set(module.factors) != {"up", "down"}:
        raise InvalidOptionError(f"{path} has half of a LoRA pair for {name}: {', '.join(module.factors) or 'alpha'}")
    up, down = module.factors["up"], module.factors["down"]
    # A convolution's kernel is in "down", as PEFT has it.
    if up.ndim < 2 or up.ndim != down.ndim or up.shape[1] != down.shape[0] or up[0, 0].numel() != 1:
        raise InvalidOptionError(
            f"the LoRA pair of {name} must be [rank, in] and [out, rank], got {[*down.shape]}, {[*up.shape]}"
        )
