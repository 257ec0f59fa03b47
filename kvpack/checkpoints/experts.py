"""Models that are two: Wan 2.2 A14B hands its later steps to a second transformer, which kvpack does not drive."""

from collections.abc import Mapping
from typing import Any

from kvpack.errors import UnsupportedPipelineError


def require_one_transformer(where: str, parts: Mapping[str, Any]) -> None:
    """Refuse a pipeline of two experts, of one of them, or of none.

    Args:
        where: how an error calls the pipeline.
        parts: what it has as `transformer`, `transformer_2` and `boundary_ratio`; what is missing is not there or None.

    Raises:
        UnsupportedPipelineError: unless there is one transformer, which makes all steps.

    >>> require_one_transformer("this pipeline", {"transformer": object(), "transformer_2": None})
    """
    names = ("transformer", "transformer_2")
    there = [name for name in names if parts.get(name) is not None]
    boundary = parts.get("boundary_ratio")
    if boundary is not None:
        raise UnsupportedPipelineError(
            f"kvpack drives one causal transformer, but {where} has boundary_ratio={boundary}, by which two of them "
            f"share the steps, and {' and '.join(there) or 'neither'} of the two; use a checkpoint of one transformer"
        )
    if there != ["transformer"]:
        raise UnsupportedPipelineError(
            f"kvpack drives one causal transformer, but {where} has "
            f"{'transformer_2 as well' if len(there) == 2 else 'no transformer'}; load it with transformer only"
        )


def require_one_in_index(where: object, index: Mapping[str, Any]) -> None:
    """Refuse as `require_one_transformer` does what a `model_index.json` says, where `[null, null]` is left out."""
    parts = {name: None if part == [None, None] else part for name, part in index.items()}
    require_one_transformer(str(where), {"transformer": True, **parts})
