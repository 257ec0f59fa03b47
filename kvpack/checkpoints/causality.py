"""Released weights that are known not to be causal, told by the names of their files and folders."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpack.checkpoints.reading import SUFFIXES
from kvpack.errors import BidirectionalWarning

#: Folders of stock Wan models, as `plain` writes them: task, size, resolution.
_WAN = r"wan2[12](t2v|i2v|ti2v|flf2v|s2v|vace)a?\d+b(480p|720p)?(diffusers)?"
_FILES = {
    "bidirectionalcheckpoint[12]?(/model)?": "CausVid's bidirectional weights, not its autoregressive ones",
    f"{_WAN}/(transformer/)?diffusionpytorchmodel[^/]*": "Wan's own weights",
}


def plain(path: Path) -> str:
    """Return a path in small letters and digits; a snapshot in the Hub's cache is in the folder of its repository.

    >>> plain(Path("/Causal-Forcing/causal-forcing++/framewise-2step.pt"))
    '/causalforcing/causalforcing/framewise2step'
    """
    whole = path.absolute().with_suffix("") if path.suffix in SUFFIXES else path.absolute()
    cached = re.sub(r"/models--[^/]*--([^/]*)/snapshots/[^/]*(?=/|$)", r"/\1", whole.as_posix())
    return re.sub("[^a-z0-9/]", "", cached.lower())


def ends(path: Path, pattern: str) -> bool:
    """Return whether whole parts at the end of a plain path match a pattern."""
    return re.search(f"(^|/){pattern}$", plain(path)) is not None


def why_not_causal(source: Path) -> str | None:
    """Return what a checkpoint is if it is known not to be causal."""
    return next((what for pattern, what in _FILES.items() if ends(source, pattern)), None)


def warn_if_bidirectional(model: Any) -> None:
    """Warn if a model was loaded from a folder or repository of a stock Wan, which is bidirectional."""
    config = getattr(model, "config", None)
    name = config.get("_name_or_path") if isinstance(config, Mapping) else None
    # A LoRA may have made it causal.
    if name and ends(Path(name), f"{_WAN}(/transformer)?") and not getattr(model, "peft_config", None):
        warnings.warn(
            f"{name} is bidirectional: it was never taught to continue a video chunk by chunk. Load a causal "
            "checkpoint, e.g. one from kvpack convert",
            BidirectionalWarning,
            stacklevel=3,
        )
