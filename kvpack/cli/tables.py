"""Rows of the tables that commands print."""

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

from kvpack.cli.support import size_text
from kvpack.errors import unknown_name
from kvpack.generation.adapter import Adapter
from kvpack.memory.codec import DENSE
from kvpack.memory.stack import Stack
from kvpack.planning.cards import Placed
from kvpack.planning.fit import GIB, Fit
from kvpack.planning.planner import Plan
from kvpack.planning.roofline import Roofline
from kvpack.plugins.registry import package_version, registry
from kvpack.training.plan import TrainingPlan

KINDS = ("stack", "memory", "partitioner", "compressor", "selector", "reindexer", "adapter")


def installed() -> list[dict[str, str]]:
    """List everything that is installed, by kind and name."""
    found, things = registry(), _things()
    order = sorted(found.origins, key=lambda key: (KINDS.index(key[0]) if key[0] in KINDS else len(KINDS), key[1]))
    return [
        {
            "role": kind,
            "name": name,
            "paper": paper(things[kind, name]),
            "package": found.origins[kind, name],
            "version": package_version(found.origins[kind, name]),
            "summary": (inspect.getdoc(things[kind, name]) or "").split("\n")[0],
        }
        for kind, name in order
    ]


def described(name: str) -> list[dict[str, Any]]:
    """List what is installed under a name, each with its options, their defaults and meanings.

    Raises:
        UnknownNameError: if nothing is.
    """
    things = _things()
    rows = [row for row in installed() if row["name"] == name]
    if not rows:
        raise unknown_name("policy, stack or adapter", name, sorted({each for _, each in things}))
    return [{**row, "options": options(things[row["role"], name])} for row in rows]


def options(thing: Any) -> list[dict[str, str]]:
    """List the options of a class or factory: names, defaults as Python writes them, and what their docstring says.

    What the docstring leaves out is told by that of a base class, or else, of kvpack's own, by another stack's of the
    same option.
    """
    if inspect.isclass(thing) and issubclass(thing, Adapter):
        return []
    stacks = [factory for (kind, _), factory in sorted(_things().items()) if kind == "stack"]
    others = stacks if thing.__module__.startswith("kvpack.") else []
    sources = [*getattr(thing, "__mro__", (thing,)), Stack, *others]
    meanings = [_meanings(each) for each in sources]
    defaults = {each.name: each.default for each in inspect.signature(thing).parameters.values()}
    if thing in stacks and _archives(thing):
        defaults = {**defaults, "store": DENSE.name, "tier": Stack.tier, "eviction": Stack.eviction}
    return [
        {
            "option": name,
            "default": "" if default is inspect.Parameter.empty else repr(default),
            "meaning": next((known[name] for known in meanings if name in known), ""),
        }
        for name, default in defaults.items()
    ]


def _archives(factory: Any) -> bool:
    try:
        made = factory()
    except Exception:  # it needs options, or fails, which is told where it is used
        return False
    return isinstance(made, Stack) and made.archives


def _meanings(thing: Any) -> dict[str, str]:
    """Parse the section Args of a Google docstring."""
    text = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", text, re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entries}


def _things() -> dict[tuple[str, str], Any]:
    found = registry()
    return {
        **found.policies,
        **{("stack", name): factory for name, factory in found.stacks.items()},
        **{("adapter", name): type(adapter) for name, adapter in found.adapters.items()},
    }


def left_out() -> list[dict[str, str]]:
    """List the plugins that failed to load."""
    return [
        {"plugin": each.plugin, "package": each.package, "version": package_version(each.package), "error": each.error}
        for each in registry().failures
    ]


def paper(thing: Any) -> str:
    """Return the first source cited by the docstring of a class or factory or of its module, or an empty text.

    >>> from kvpack.policies import MemRoPE
    >>> paper(MemRoPE)
    'arXiv 2603.12513'
    """
    module = sys.modules.get(getattr(thing, "__module__", ""))  # a partial has none
    text = " ".join(f"{thing.__doc__ or ''} {getattr(module, '__doc__', None) or ''}".split())
    cited = re.search(r"arXiv[:. /\w]*?(\d{4}\.\d{4,5})|((?:https?://|github\.com/)[^\s,;)]+)", text)
    if cited is None:
        return ""
    return f"arXiv {cited[1]}" if cited[1] else cited[2].rstrip(".")


def plan_rows(plan: Plan) -> list[list[str]]:
    """Return the rows of a plan's table."""
    share = plan.attended_kv_bytes / plan.full_kv_bytes
    other = "--guidance counts 2" if plan.branches == 1 else "--no-guidance counts 1"
    rows = [
        ["guidance branches", f"{plan.branches}; {other}"],
        ["chunks", f"{plan.chunks:,} of {plan.chunk_tokens:,} tokens"],
        ["attended by the last chunk", f"{plan.attended_tokens:,} tokens, itself included"],
        ["KV attended", f"{size_text(plan.attended_kv_bytes)} ({plan.attended_kv_bytes:,} B)"],
        ["KV archived", f"{size_text(plan.archive_kv_bytes)}: {_archived(plan)}"],
        ["KV held in all", f"{size_text(plan.resident_kv_bytes)} on the device"],
        ["full history", f"{plan.full_tokens:,} tokens, {size_text(plan.full_kv_bytes)}"],
        ["attended of full history", f"{share:.2%}"],
        ["transformer, per chunk", f"{plan.flops_per_chunk:.3g} FLOPs"],
    ]
    return [*rows, ["compression, per chunk", _compression(plan)]] if plan.compressor_flops else rows


def roofline_row(speed: Roofline) -> list[str]:
    """Return the row of a plan's table that says the seconds of a chunk."""
    parts = f"operations {speed.operations:.3g} s, bytes {speed.bytes:.3g} s"
    return ["seconds a chunk, at least", f"{speed.seconds:.3g}; {speed.limit} limits ({parts})"]


def fit_rows(fit: Fit, plan: Plan, tier: str) -> list[list[str]]:
    """Return the rows of a table of what is on a graphics card, and of an archive that is on another tier."""
    elsewhere = [] if tier == "device" else [(f"archive, on the {tier}", plan.archive_kv_bytes)]
    twice = f"of the chunk in the making; both above are there {fit.copies} times"
    passing = twice if fit.copies > 1 else "archived keys of a layer that chooses"
    rows: list[tuple[str, float]] = [
        ("transformer", fit.transformer),
        ("VAE", fit.vae),
        ("text encoder", fit.text_encoder),
        ("keys and values, at most", fit.kv - plan.workspace_kv_bytes),
        ("working buffer of all layers", plan.workspace_kv_bytes),
        *elsewhere,
        *([(passing, fit.passing)] if fit.passing else []),
        ("activations of a forward", fit.denoising),
        ("activations of decoding a chunk", fit.decoding),
        ("of these kept for the next one, in a stream", fit.features),
        *((f"together, {call}", total) for call, total in fit.totals.items()),
    ]
    return [[name, size_text(count)] for name, count in rows]


def card_rows(cards: Sequence[Placed]) -> list[list[str]]:
    """Return the rows of a table of graphics cards."""
    rows = []
    for each in cards:
        if each.call is None or each.choice is None:
            rows.append([f"{each.gpu_memory:g} GiB", each.advice.partition(", ")[2], "", "", ""])
            continue
        changed = ", ".join(f"{name}={value}" for name, value in each.choice.changes.items())
        total = f"{each.total / GIB:.1f} GiB"
        rows.append([f"{each.gpu_memory:g} GiB", each.call, changed, size_text(each.fit.kv), total])
    return rows


def _archived(plan: Plan) -> str:
    each = f" of {plan.archive_tokens / plan.archive_blocks:,.4g} tokens" if plan.archive_blocks else ""
    return f"{plan.archive_blocks:,} blocks{each}"


def _compression(plan: Plan) -> str:
    total = sum(plan.compressor_flops.values())
    parts = " + ".join(f"{name} {count:.2g}" for name, count in plan.compressor_flops.items())
    learned = [f"; {name} {count:,} parameters" for name, count in plan.compressor_parameters.items() if count]
    decoded = "; lr's decoding is the user's own" if "lr" in plan.compressor_flops else ""
    return f"{parts} FLOPs, {total / (plan.flops_per_chunk + total):.2%} of the chunk{''.join(learned)}{decoded}"


def training_rows(plan: TrainingPlan) -> list[list[str]]:
    """Return the rows of a training plan's table."""
    seconds = plan.flops_per_step / 1e14
    return [
        ["frozen model", f"{plan.model_parameters / 1e9:.3g} G parameters, {size_text(plan.model_bytes)}"],
        ["compressor", f"{plan.trained_parameters:,} parameters, {size_text(plan.trained_bytes)} with its optimiser"],
        ["graph of a chunk and its twins", size_text(plan.graph_bytes)],
        ["KV, packed and whole", size_text(plan.kv_bytes)],
        ["clips and decoder of a batch", size_text(plan.batch_bytes)],
        ["together", f"{size_text(plan.total_bytes)}, text encoder not counted: captions are embedded first"],
        ["a step", f"{plan.flops_per_step:.3g} FLOPs; {seconds:.3g} s at a sustained 100 TFLOP/s"],
    ]
