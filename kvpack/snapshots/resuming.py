"""A generation resumed from a folder of snapshots."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from kvpack.errors import InvalidOptionError, KVPackError, SnapshotError, SnapshotWarning
from kvpack.generation.moment import Moment, begun, go_on, set_own_generators
from kvpack.generation.run import Run
from kvpack.memory.stack import Stack
from kvpack.snapshots.checks import check_attributes, check_moment, check_sessions
from kvpack.snapshots.fingerprint import fingerprints, model_digests, require_same
from kvpack.snapshots.folder import SnapshotFolder
from kvpack.snapshots.reading import TreeReader, explained
from kvpack.snapshots.saver import GIVEN_AGAIN, plugins, versions
from kvpack.snapshots.tensors import TensorFiles
from kvpack.snapshots.types import allowed_classes, policies_of
from kvpack.snapshots.writing import KIND, TreeWriter

_SAID = {"pipeline", "adapter", "models", "lora", "scheduler", "stack", "geometry", "state", "generation"}


def saved_stack(folder: Path) -> Mapping[str, Any]:
    """Return the stack of a folder's newest readable snapshot, as `to_dict` gave it.

    Raises:
        SnapshotError: if no snapshot can be read.
    """

    def use(content: dict[str, Any], files: TensorFiles) -> Mapping[str, Any]:
        stack = TreeReader({}, {}, torch.device("cpu"), files).value(content.get("stack"))
        if not isinstance(stack, Mapping):
            raise SnapshotError("it does not say its stack")
        return stack

    return SnapshotFolder(folder).read(use)


def resumed(pipeline: Any, folder: Path, given: Mapping[str, Any], number: int | None = None) -> tuple[Run, str, Any]:
    """Return the generation of a folder's newest readable snapshot, its name and its note.

    Args:
        pipeline: an enabled pipeline, with the model and the stack that it was saved with.
        folder: of the snapshots.
        given: arguments of the call that are functions, which no file has.
        number: of the snapshot; None is the newest that can be read.

    Raises:
        SnapshotError: if no snapshot can be read, or it is of another model or stack.
    """

    def use(content: dict[str, Any], files: TensorFiles) -> tuple[Run, str, Any]:
        with explained("no generation goes on from it", KVPackError):
            return _resumed(pipeline, content, files, given)

    shard = pipeline._kvpack.adapter.shard(pipeline)
    with nullcontext() if shard is None else shard.together(SnapshotError):  # if one rank cannot read it, none goes on
        return SnapshotFolder(folder).read(use, number)


def _resumed(
    pipeline: Any, content: dict[str, Any], files: TensorFiles, given: Mapping[str, Any]
) -> tuple[Run, str, Any]:
    adapter, stack = pipeline._kvpack.adapter, pipeline._kvpack.stack
    if missing := _SAID - set(content):
        raise SnapshotError(f"it does not say {', '.join(sorted(missing))}")
    if content["pipeline"] != pipeline._kvpack_base.__name__ or content["adapter"] != adapter.name:
        raise SnapshotError(
            f"the generation is that of a {content['pipeline']} with the adapter {content['adapter']}, but this is a "
            f"{pipeline._kvpack_base.__name__} with {adapter.name}"
        )
    # Before anything is made of it: another model would go on with other bits.
    require_same(content, fingerprints(pipeline, model_digests(pipeline)), pipeline._kvpack_base.__name__)
    adapter.check(pipeline)
    device, state = pipeline._execution_device, content["state"]
    reader = TreeReader(allowed_classes(stack, adapter), policies_of(stack), device, files)
    attributes = check_attributes(adapter.run_class, reader.value(state["run"]))
    attributes["call"] = _with_given(attributes["call"], given)
    run = begun(adapter, pipeline, attributes, stack)  # first: what a budget chooses depends on the call
    choice = pipeline._kvpack.choice_for(run, reader.value(state["conditioning"]))
    run.stack = run.stack if choice is None else choice.memory
    _require_equal("stack", content["stack"], run.stack.to_dict(), run)
    # Again, for an archive is read by the codec of the stack, which a budget may have chosen.
    known, shard = (allowed_classes(run.stack, adapter), policies_of(run.stack), device, files), adapter.shard(pipeline)
    # Of the stack here: an archive may go on on another tier than it was on.
    tier = run.stack.tier if isinstance(run.stack, Stack) else None
    reader, own = TreeReader(*known, tier), TreeReader(*known, tier, None if shard is None else shard.own)
    readers = {name: own if name == "pasts" else reader for name in state if name != "run"}  # they alone have heads
    moment = Moment(run=attributes, **{name: each.value(state[name]) for name, each in readers.items()})
    check_moment(moment, run)
    _require_generators(attributes["call"].get("generator"), device)
    go_on(run, moment)
    # The whole model's, whichever heads this rank has.
    _require_equal("geometry", content["geometry"], run.denoiser.geometry, run)
    check_sessions(run)
    set_own_generators(run, moment)  # torch's own state, so only when nothing can be refused any more
    _warn_of_versions(content, run)
    pipeline._kvpack.choice = choice  # last: a resume that is refused leaves the choice that was there
    return run, str(content["generation"]), content.get("note")


def _require_generators(given: Any, device: torch.device) -> None:
    """Raise `SnapshotError` if noise cannot be drawn where the pipeline is: a CPU's generator serves every device."""
    for each in given if isinstance(given, list) else [given]:
        if each is not None and each.device.type not in ("cpu", device.type):
            raise SnapshotError(
                f"its noise is drawn on {each.device.type!r}, but the pipeline is on {device.type!r}; move the "
                f"pipeline to {each.device.type!r} (a generation whose generator is on the CPU goes on anywhere)"
            )


def _with_given(call: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the call, functions among them as they are given again."""
    # A dict first, since == of an array is no bool.
    wanted = {name for name, value in call.items() if isinstance(value, dict) and value == GIVEN_AGAIN}
    if wanted != set(given):
        names = ", ".join(sorted(wanted)) or "none"
        raise InvalidOptionError(
            f"of the call's arguments those that are functions are given again to resume(), here {names}; "
            f"got {', '.join(sorted(given)) or 'none'}"
        )
    return {**call, **given}


def _require_equal(what: str, saved: Any, here: Any, run: Run) -> None:
    """Raise `SnapshotError` if the stack or the geometry is another one than the generation's."""
    writer = TreeWriter(allowed_classes(run.stack, run.adapter), {}, run.pipeline._execution_device, ("", ""))
    node = writer.node(here, what)
    free = what == "stack" and isinstance(run.stack, Stack)  # its archive may go on on another tier
    if node != saved and not (free and _but_tier(node) == _but_tier(saved)):
        was, now = map(brief, differing(saved, node))
        raise SnapshotError(
            f"the {what} of the generation was {was}, but here it is {now}; enable the pipeline as it was then"
        )


def differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Return two written trees without the entries that both have, for an error.

    >>> pairs = [["topk", 4], ["name", "a"]], [["topk", 5], ["name", "a"]]
    >>> [each["of"] for each in differing(*({"!": "dict", "of": each} for each in pairs))]
    [[['topk', 4]], [['topk', 5]]]
    """
    if not all(isinstance(each, dict) and each.get(KIND) == "dict" for each in (one, other)):
        return one, other
    return tuple(  # type: ignore[return-value]  # there are two
        {KIND: "dict", "of": [pair for pair in each["of"] if pair not in beside["of"]]}
        for each, beside in ((one, other), (other, one))
    )


def _but_tier(node: Any) -> Any:
    """Return a written stack without its tier, which is where bits lie, not which."""
    if not isinstance(node, dict) or node.get(KIND) != "dict":
        return node
    return {**node, "of": [pair for pair in node["of"] if pair[0] != "tier"]}


def brief(node: Any) -> str:
    """Return a written tree in few words, for an error.

    >>> brief({"!": "dict", "of": [["topk", 4], ["name", "a"]]})
    '{topk: 4, name: a}'
    """
    if isinstance(node, dict):
        if node.get(KIND) == "dict":
            return "{" + ", ".join(f"{key}: {brief(value)}" for key, value in node["of"]) + "}"
        if node.get(KIND) == "data":
            return "{" + ", ".join(f"{key}: {brief(value)}" for key, value in node["fields"].items()) + "}"
        return str(node.get("name", node.get("of")))
    return str(node)[:200]


def _warn_of_versions(content: Mapping[str, Any], run: Run) -> None:
    others = content.get("plugins")
    saved = {**content, **(others if isinstance(others, dict) else {})}
    for name, version in {**versions(), **plugins(run.stack, run.adapter)}.items():
        if saved.get(name) != version:
            then = f"the generation was saved with {name} {str(saved.get(name))[:80]}"
            warnings.warn(f"{then}, and goes on with {version}: bits may differ", SnapshotWarning, stacklevel=5)
