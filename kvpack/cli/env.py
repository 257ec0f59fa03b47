"""`kvpack env`: versions, devices and attention backends, for a report of what went wrong."""

import platform
import warnings
from typing import Any

from kvpack.cli import options
from kvpack.cli.support import default_device, print_json, print_table, size_text

#: What a video depends on, and what may be switched on beside it.
PACKAGES = (
    "kvpack",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "huggingface-hub",
    "safetensors",
    "av",
    "peft",
    "torchao",
    "xformers",
    "flash-attn",
    "sageattention",
)


def env(as_json: options.Json = False) -> None:
    """Say what is installed: versions, devices, attention backends, plugins. Paste it into a report."""
    found = environment()
    if as_json:
        print_json(found)
        return
    texts = {name: (", ".join(value) or "none") if isinstance(value, list) else value for name, value in found.items()}
    print_table("environment", ("", "here"), list(texts.items()))


def environment() -> dict[str, Any]:
    """Return versions of packages, devices, the attention backends that run on the first of them, and plugins."""
    import torch

    from kvpack.cli.tables import left_out
    from kvpack.plugins.registry import package_version, registry

    device = torch.device(default_device())
    packages = {name: found for name in PACKAGES if (found := package_version(name))}
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        **packages,
        "devices": _devices(),
        f"attention backends on {device.type}": _backends(device),
        "plugins": sorted(set(registry().origins.values()) - {"kvpack"}),
        "plugins left out": [f"{each['plugin']}: {each['error']}" for each in left_out()],
    }


def _devices() -> list[str]:
    """Describe the devices that torch sees, the CPU last."""
    import torch

    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    named = [f"cuda:{index} {each.name}, {size_text(each.total_memory)}" for index, each in enumerate(cards)]
    apple = ["mps"] if torch.backends.mps.is_available() else []
    return [*named, *apple, f"cpu, {torch.get_num_threads()} threads"]


def _backends(device: Any) -> list[str]:
    """List the attention backends of diffusers that attend something on a device; none is fetched from the Hub."""
    import torch
    from diffusers.models.attention_dispatch import AttentionBackendName

    from kvpack.adapters.compatibility import check_backend
    from kvpack.errors import UnsupportedPipelineError

    dtype, found = torch.bfloat16 if device.type == "cuda" else torch.float32, []
    for name in AttentionBackendName:
        if name.value.endswith("_hub"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of backends that are slow like this
                check_backend(name, device, lambda: dtype, head_dim=64)
        except UnsupportedPipelineError:
            continue
        found.append(name.value)
    return found
