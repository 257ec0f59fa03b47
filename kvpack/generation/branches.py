"""Another future of a generation's past."""

from collections.abc import Sequence
from typing import Any

import torch

from kvpack.errors import InvalidOptionError
from kvpack.generation.moment import begun, captured, go_on
from kvpack.generation.run import Run

#: A seed, or one for each video whose noise has a generator of its own.
Seed = int | Sequence[int]


def forked(run: Run) -> Run:
    """Return another run that goes on from where one is, over the same blocks; neither notices what the other does.

    Raises:
        SnapshotError: if it is in the middle of a chunk, or was interrupted or failed in one.
    """
    moment = captured(run, apart=True)
    own = _apart(moment.run, {})  # generators and lists are the other run's from here on
    return go_on(begun(run.adapter, run.pipeline, own, run.stack), moment)


def reseed(run: Run, seed: Seed | None) -> None:
    """Draw a generation's noise from here on by other seeds, unless None is given.

    Raises:
        InvalidOptionError: if there are not as many seeds as the call has generators.
    """
    if seed is None:
        return
    now = run.call.get("generator")
    if isinstance(now, list):
        if not isinstance(seed, Sequence) or len(seed) != len(now):
            raise InvalidOptionError(f"the call has {len(now)} generators; give as many seeds, got {seed!r}")
        run.call["generator"] = [_seeded(each, own) for each, own in zip(seed, now, strict=True)]
    elif isinstance(seed, Sequence):
        raise InvalidOptionError(f"the call has one generator; give one seed, got {seed!r}")
    else:
        run.call["generator"] = _seeded(seed, now)


def _seeded(seed: int, like: torch.Generator | None) -> torch.Generator:
    return torch.Generator("cpu" if like is None else like.device).manual_seed(seed)


def _apart(value: Any, generators: dict[int, torch.Generator]) -> Any:
    """Return a copy of everything that a run changes in place; the same generator twice is one again."""
    if isinstance(value, dict):
        return {key: _apart(each, generators) for key, each in value.items()}
    if isinstance(value, list):
        return [_apart(each, generators) for each in value]
    if isinstance(value, torch.Generator):
        if id(value) not in generators:
            generators[id(value)] = torch.Generator(value.device).set_state(value.get_state())
        return generators[id(value)]
    return value
