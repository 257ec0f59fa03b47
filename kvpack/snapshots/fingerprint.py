"""What tells two models apart: names, shapes and some numbers of each weight, LoRA adapters, and the scheduler."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from kvpack.errors import SnapshotError

_SAMPLES = 64  # of each weight, since they are read at every save


def model_digests(pipeline: Any) -> dict[str, str]:
    """Return a digest of each model of a pipeline, LoRA left aside."""
    return {name: _of_model(each) for name, each in _models(pipeline).items()}


def fingerprints(pipeline: Any, models: Mapping[str, str]) -> dict[str, Any]:
    """Return what a snapshot says of its pipeline's components, as JSON takes it.

    Args:
        pipeline: the pipeline.
        models: what `model_digests` gave for it.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    return {
        "models": dict(models),
        "lora": {name: found for name, each in _models(pipeline).items() if (found := _lora(each))},
        "scheduler": None if scheduler is None else f"{type(scheduler).__name__} {_config(scheduler)}",
    }


def require_same(saved: Mapping[str, Any], here: Mapping[str, Any], name: str) -> None:
    """Raise `SnapshotError` if a pipeline differs from the one that a snapshot was made with.

    Components that one of the two lacks are not compared, but for those that generate: the prompt's embeddings are in
    the snapshot, so that the text encoder need not be.

    Args:
        saved: what `fingerprints` gave of the one.
        here: what it gives of the other.
        name: class of the pipeline, for the error.
    """
    if saved["lora"] != here["lora"]:
        raise SnapshotError(
            f"the generation ran with LoRA {_shown(saved['lora'])}, but this pipeline has {_shown(here['lora'])}"
            f"{', of other weights or fused otherwise' if _shown(saved['lora']) == _shown(here['lora']) else ''}; load "
            "the same adapters at the same scale"
        )
    if ("writer" in saved["models"]) != ("writer" in here["models"]):
        which = "a writer" if "writer" in saved["models"] else "no writer"
        raise SnapshotError(f"the generation ran with {which}; set pipe.packforcing.writer to what it was saved with")
    for part, digest in saved["models"].items():
        found = here["models"].get(part)
        if found is None and part not in ("transformer", "vae"):
            continue
        if found != digest:
            raise SnapshotError(
                f"the generation ran with another {part} than this {name} has; load the model, in the dtype, that it "
                "was saved with"
            )
    if saved["scheduler"] != here["scheduler"]:
        raise SnapshotError(
            f"the generation ran with the scheduler {str(saved['scheduler'])[:300]}, but this pipeline has "
            f"{str(here['scheduler'])[:300]}"
        )


def _models(pipeline: Any) -> dict[str, nn.Module]:
    models = {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}
    enabled = vars(pipeline).get("_kvpack")
    compressor = None if enabled is None else enabled.stack.latent_compressor
    own = {"writer": getattr(enabled, "writer", None), "compressor": getattr(compressor, "network", None)}
    return {**models, **{name: each for name, each in own.items() if each is not None}}


def _of_model(model: nn.Module) -> str:
    """Return a digest of names, shapes, dtypes and some numbers of all weights but LoRA's."""
    digest, samples = hashlib.sha256(), []
    for name, weight in sorted(model.named_parameters()):
        if "lora_" not in name:
            # Without what PEFT and torch.compile put into the names of weights.
            plain = name.replace(".base_layer", "").replace("_orig_mod.", "")
            digest.update(f"{plain} {tuple(weight.shape)} {weight.dtype}".encode())
            samples.append(_sample(weight))
    digest.update(_bytes(samples))
    return digest.hexdigest()


def _sample(weight: Tensor) -> Tensor:
    """Return some numbers of a tensor, as bytes; none of one that is elsewhere, or that has no plain numbers."""
    # Offloaded weights have no numbers here, quantised ones none that are plain.
    if weight.device.type == "meta" or type(weight.data) is not Tensor:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].contiguous().view(torch.uint8)  # spread over all of it


def _bytes(samples: Sequence[Tensor]) -> bytes:
    """Return all samples on the host, for which a device is waited for once."""
    some = [each for each in samples if len(each)]
    return torch.cat([each.to(some[0].device) for each in some]).cpu().numpy().tobytes() if some else b""


def _lora(model: nn.Module) -> dict[str, Any] | None:
    """Return names, scales and a digest of a model's active LoRA adapters; None if there are none."""
    scales: dict[str, set[float]] = {}
    digest, samples = hashlib.sha256(), []
    layers: dict[str, Any] = {name.replace("_orig_mod.", ""): each for name, each in model.named_modules()}
    for name, module in sorted(layers.items(), key=itemgetter(0)):
        scaling = getattr(module, "scaling", None)
        if not isinstance(scaling, dict) or getattr(module, "disable_adapters", False):
            continue
        for adapter in sorted(set(scaling) & set(getattr(module, "active_adapters", ()))):
            scales.setdefault(adapter, set()).add(float(scaling[adapter]))
            # Fused weights round otherwise.
            digest.update(f"{name} {adapter} {scaling[adapter]!r} {sorted(module.merged_adapters)}".encode())
            for own, weight in sorted(module.named_parameters()):
                if "lora_" in own and f".{adapter}." in f".{own}.":
                    digest.update(own.encode())
                    samples.append(_sample(weight))
    if not scales:
        return None
    digest.update(_bytes(samples))
    return {"scales": {adapter: sorted(each) for adapter, each in scales.items()}, "sha256": digest.hexdigest()}


def _config(scheduler: Any) -> str:
    # What begins so is diffusers' own, such as its version; the class is compared by itself.
    own = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return json.dumps(own, sort_keys=True, default=str)


def _shown(lora: Mapping[str, Any]) -> str:
    each = [f"{name} x {scales}" for found in lora.values() for name, scales in found["scales"].items()]
    return ", ".join(each) or "none"
