"""Checkpoints: written whole or not at all, read with weights_only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

RUNS = Path("runs/toyworld")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint beside the old one, then replace it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load(path: Path) -> dict[str, Any] | None:
    """Load the checkpoint, or return None if there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def weights(path: Path) -> dict[str, Any]:
    """Load a checkpoint that must be there.

    Raises:
        FileNotFoundError: if it is not.
    """
    state = load(path)
    if state is None:
        raise FileNotFoundError(f"no checkpoint {path}; train it first")
    return state
