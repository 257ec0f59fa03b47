"""Where a compressor's weights come from: a folder, the Hub, or a module at hand."""

import copy
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError

from kvpack.checkpoints.hub import HUB_ID
from kvpack.checkpoints.text import read_json
from kvpack.compressors.network import CONFIG_FILE, WEIGHTS_FILE, HighResolutionBranch
from kvpack.errors import InvalidOptionError

_RIGHT = "give a folder that HighResolutionBranch.save_pretrained wrote, or a Hub id, which is owner/name"


class CompressorWeights:
    """A compressor's network, loaded at first use, with a copy for each device and dtype.

    Args:
        weights: folder or Hub id, the module itself, or None for what it is before training.
    """

    def __init__(self, weights: str | HighResolutionBranch | None) -> None:
        self.weights = weights
        self._copies: dict[object, HighResolutionBranch] = {}

    def __reduce__(self) -> Any:
        """Copy and pickle without what was loaded."""
        return (CompressorWeights, (self.weights,))

    @cached_property
    def given(self) -> HighResolutionBranch | None:
        """The network as it was given; None before training."""
        return load_branch(self.weights) if isinstance(self.weights, str) else self.weights

    def fitting(self, channels: int, width: int, patch: tuple[int, int]) -> HighResolutionBranch:
        """Return the network for a model with such latents and tokens.

        Raises:
            InvalidOptionError: if there are no such weights, or they were made for another model.
        """
        branch = self.given
        if branch is None:
            return HighResolutionBranch(channels=channels, width=width, patch=patch)
        if (branch.channels, branch.width, branch.patch) != (channels, width, patch):
            source = self.weights if isinstance(self.weights, str) else "given as a module"
            raise InvalidOptionError(
                f"compressor weights {source}, made for {branch.base_model or 'an unnamed model'}, are for channels="
                f"{branch.channels}, width={branch.width}, patch={branch.patch}, but this pipeline has channels="
                f"{channels}, width={width}, patch={patch}; give weights trained for this model"
            )
        return branch

    def on(
        self, device: torch.device, dtype: torch.dtype, channels: int, width: int, patch: tuple[int, int]
    ) -> HighResolutionBranch:
        """Return the network on a device; a given module that is being trained is returned itself, not a copy.

        Raises:
            InvalidOptionError: as `fitting`.
        """
        # The module itself, since a copy would not learn.
        if isinstance(self.weights, HighResolutionBranch) and _in_use(self.weights, device, dtype):
            return self.fitting(channels, width, patch)
        key = (device, dtype, channels, width, patch)
        if key not in self._copies:
            # A copy, so that a module that is given stays on its device and goes on requiring gradients.
            branch = copy.deepcopy(self.fitting(channels, width, patch))
            self._copies[key] = branch.requires_grad_(False).eval().to(device, dtype)
        return self._copies[key]


def branch_config(source: str) -> dict[str, Any]:
    """Read the config beside the weights in a folder or on the Hub.

    Raises:
        InvalidOptionError: if there is nothing of the kind.
    """
    path = _file(source, CONFIG_FILE)
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise InvalidOptionError(f"cannot read {path}: {error}; {_RIGHT}") from error
    needed = {"channels", "width", "patch"}
    if not isinstance(config, dict) or needed - set(config):
        raise InvalidOptionError(f"{path} must be a JSON object with {', '.join(sorted(needed))}; {_RIGHT}")
    return config


def load_branch(source: str) -> HighResolutionBranch:
    """Load a network from a folder or the Hub; a folder needs no internet connection.

    Raises:
        InvalidOptionError: if there is none, or it is broken.
    """
    branch_config(source)  # first, for its error says more than that of the weights
    folder = _file(source, WEIGHTS_FILE).parent  # the Hub's cache keeps both files in one
    try:
        branch = HighResolutionBranch.from_pretrained(folder)
    except (SafetensorError, RuntimeError, TypeError, ValueError, OSError, OverflowError) as error:
        what = " ".join(str(error).split())[:300]  # torch writes a line for each weight
        raise InvalidOptionError(f"cannot load the compressor {source}: {what}; {_RIGHT}") from error
    if broken := next((name for name, each in branch.named_parameters() if not each.isfinite().all()), None):
        raise InvalidOptionError(f"cannot load the compressor {source}: {broken} is not finite; train it anew")
    return branch


def _file(source: str, name: str) -> Path:
    if os.path.isdir(source):
        path = Path(source, name)
        if not path.is_file():
            raise InvalidOptionError(f"compressor folder {source} has no {name}; {_RIGHT}")
        return path
    if not HUB_ID.fullmatch(source):
        raise InvalidOptionError(f"no compressor folder {source}; {_RIGHT}")
    try:
        return Path(hf_hub_download(source, name))
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise InvalidOptionError(
            f"there is no folder {source}, and {name} of that Hub id cannot be had: {error}; {_RIGHT}"
        ) from error


def _in_use(branch: HighResolutionBranch, device: torch.device, dtype: torch.dtype) -> bool:
    weight = branch.projection.weight
    return (weight.device, weight.dtype) == (device, dtype) or any(each.requires_grad for each in branch.parameters())
