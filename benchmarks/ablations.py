"""What each part of packforcing is worth: one option changed at a time, on the toy world.

Figures go to benchmarks/results/ablation-<name>.json and .md: videos up to each length, `drift` from their first to
their last five seconds, and cost; low and high are 95 % bootstrap intervals over captions and their seeds. An option
that is not there costs its own line only. Ends with 1 if a line failed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, get_args

from benchmarks import report
from benchmarks.leaderboard import figures, plots, run, tables
from benchmarks.leaderboard.subjects import Memory, collection
from kvpack.media.files import save_bytes
from kvpack.memory.eviction import Eviction
from kvpack.shipped import shipped_compressor

SECONDS, SEEDS = 60, 1
# Not one option changed but all: every installed stack.
COLLECTION = "collection"
REINDEXERS = ("absolute", "sink-shift", "contiguous", "fit")
COMPRESSORS = ("identity", "pool", "lr")
SELECTORS = ("topk", "recency", "uniform", "random", "softmax-mass")
TRAINED = str(shipped_compressor())
TOPKS = (0, 1, 2, 4, 8, 16, 32)


def _changed(variants: Mapping[str, Mapping[str, Any]]) -> tuple[Memory, ...]:
    """Packforcing with options, of pooled blocks by their sums of q . k unless these say otherwise."""
    base = {"compressor": "pool", "selector": "topk"}
    return tuple(Memory(name, "packforcing", {**base, **options}) for name, options in variants.items())


def _each(option: str, values: tuple[Any, ...]) -> tuple[Memory, ...]:
    return _changed({f"{option.replace('_', ' ')} {value}": {option: value} for value in values})


def _kept(tokens: int, selector: str, topk: int) -> dict[str, Any]:
    """Return options of blocks of a few of their own tokens."""
    compressor = {"policy": "keep-farthest", "keep_tokens": tokens}
    return {"compressor": compressor, "selector": selector, "topk": topk}


def _archive(rule: str, blocks: int, length: str = "") -> Memory:
    options = {"keep_tokens": 8, "topk": 4, "archive_blocks": blocks, "eviction": rule}
    return Memory(f"{length}{rule}, {blocks} blocks", "packforcing", options)


ABLATIONS: dict[str, tuple[Memory, ...]] = {
    COLLECTION: collection(),
    "positions": _changed(
        {
            f"{reindexer}, topk {topk}": {"reindexer": reindexer, "topk": topk}
            for reindexer in REINDEXERS
            for topk in TOPKS
        }
    ),
    "coordinates": _each("coordinates", ("centered", "strided", "compact")),
    "compressor": _changed(
        {f"{name}, topk {topk}": {"compressor": name, "topk": topk} for name in COMPRESSORS for topk in (1, 4, 16)}
    ),
    "selector": _changed(
        {
            **{f"selector {name}": {"selector": name, "topk": 4} for name in SELECTORS},
            "selector topk after RoPE": {"selector": {"policy": "topk", "topk": 4, "after_rope": True}},
            "selector all": {"selector": "all"},
        }
    ),
    # With blocks that were taught to keep something: how many, and which?
    "trained": _changed(
        {
            **{f"dual, topk {topk}": {"compressor": TRAINED, "topk": topk} for topk in (1, 2, 4, 8, 16)},
            **{
                f"dual, {selector} 4": {"compressor": TRAINED, "selector": selector, "topk": 4}
                for selector in ("recency", "uniform", "random")
            },
        }
    ),
    # A budget of 32 tokens of the middle, 224 in all: many blocks of few tokens, or few of many?
    "keep": _changed(
        {
            "pool, 16 x 2": {"compressor": "pool", "topk": 16},
            **{
                f"keep {tokens} of 64, {selector} {32 // tokens}": _kept(tokens, selector, 32 // tokens)
                for tokens in (16, 8, 4, 2)
                for selector in ("topk", "softmax-mass", "recency")
            },
        }
    ),
    # The same at 128 tokens of the middle, 320 in all.
    "keep-more": _changed(
        {
            **{
                f"whole blocks, {selector} 2": {"compressor": "identity", "selector": selector, "topk": 2}
                for selector in ("topk", "softmax-mass", "recency")
            },
            **{
                f"keep {tokens} of 64, {selector} {128 // tokens}": _kept(tokens, selector, 128 // tokens)
                for tokens in (32, 16, 8)
                for selector in ("topk", "softmax-mass", "recency")
            },
        }
    ),
    # Which tokens to keep, at 16 of 64 and two blocks.
    "kept-tokens": _changed(
        {
            **{
                f"{name}, softmax-mass 2": {
                    "compressor": {"policy": name, "keep_tokens": 16},
                    "selector": "softmax-mass",
                    "topk": 2,
                }
                for name in ("keep-keydiff", "keep-attended", "keep-random", "keep-grid", "keep-merge")
            },
            **{
                f"keep-farthest in {rounds} rounds, softmax-mass 2": {
                    "compressor": {"policy": "keep-farthest", "keep_tokens": 16, "rounds": rounds},
                    "selector": "softmax-mass",
                    "topk": 2,
                }
                for rounds in (16, 6, 3)
            },
            "pool-time, softmax-mass 2": {"compressor": "pool-time", "selector": "softmax-mass", "topk": 2},
        }
    ),
    # How many queries say which blocks?
    "queries": _changed(
        {
            f"{queries} of 64 queries": {
                "compressor": {"policy": "keep-farthest", "keep_tokens": 16},
                "selector": {"policy": "softmax-mass", "topk": 2, "max_queries": queries},
            }
            for queries in (64, 16, 4, 1)
        }
    ),
    # What is kept whole must leave positions for the middle: more of it has more positions.
    "sink": _changed(
        {
            **{f"sink {frames}": {"sink_frames": frames} for frames in (0, 4, 8)},
            "sink 16, 28 positions": {"sink_frames": 16, "train_frames": 28},
        }
    ),
    "recent": _changed(
        {"recent 4": {"recent_frames": 4}, "recent 8, 24 positions": {"recent_frames": 8, "train_frames": 24}}
    ),
    "commit": _each("commit", ("rerun", "last-step")),
    "selection": _changed(
        {"selection layer": {"share_selection": False}, "selection chunk": {"share_selection": True}}
    ),
    # What becomes of an archive that is full; two minutes do not fill one of 128 blocks.
    "eviction": (
        _archive("oldest", 128),
        *(_archive(rule, blocks) for blocks in (16, 8) for rule in get_args(Eviction)),
    ),
    # The same of videos that fill 128 blocks again and again; ten minutes.
    "eviction-long": (_archive("oldest", 128, "long: "), _archive("merged", 8, "long: ")),
    # Too many keys, or positions that were never seen in training? Each of the two alone.
    "full": (
        Memory("full: all keys, true positions", "full"),
        *_changed(
            {
                "all keys, squeezed positions": {"compressor": "identity", "selector": "all", "reindexer": "fit"},
                "few keys, true positions": {
                    "compressor": "identity",
                    "selector": "uniform",
                    "topk": 4,
                    "reindexer": "absolute",
                },
                "few keys, squeezed positions": {
                    "compressor": "identity",
                    "selector": "uniform",
                    "topk": 4,
                    "reindexer": "fit",
                },
            }
        ),
    ),
}
#: Variants that are compared with each other one of their ablation, video by video.
COMPARED = {"eviction": ("merged, 16 blocks", "merged, 8 blocks"), "eviction-long": ("long: merged, 8 blocks",)}
SMOKE = {"commit": ABLATIONS["commit"]}


def main() -> int:
    """The whole command line."""
    parser = run.parser(__doc__ or "", SECONDS, SEEDS)
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), metavar="NAME", help=", ".join(ABLATIONS))
    options = run.parsed(parser)
    chosen = {name: ABLATIONS[name] for name in options.only} if options.only else SMOKE if options.smoke else ABLATIONS
    # All at once, so that no process waits for the last variant of each.
    found, failed = run.measured([variant for variants in chosen.values() for variant in variants], options)
    for name, variants in chosen.items():
        named = {variant.name for variant in variants}
        _keep(name, [each for each in found if each.name in named], options)
    return 1 if failed else 0


def _keep(name: str, found: list[figures.Measured], options: Any) -> None:
    """One table."""
    scores = [row for each in found for row in figures.scores(each, None, options.resamples)]
    heroes = [each for each in found if each.name in COMPARED.get(name, ())]
    pairs = [(hero, rival) for hero in heroes for rival in found if rival is not hero]
    scores += [row for pair in pairs for row in figures.differences(*pair, options.resamples)]
    rows = run.stamped(scores, "ablations")
    if rows:
        path = report.write(f"ablation-{name}", rows, options.out)
        names = [each.name for each in found]
        page = f"# {name.capitalize()}\n\n{tables.leaderboard(rows, names, [each.name for each in heroes])}\n"
        save_bytes(page.encode(), path.with_suffix(".md"))
        longest = max(row.seconds for row in rows)
        if name == COLLECTION:
            plots.save(path.with_suffix(".png"), lambda: plots.over_budget(rows, longest, plots.BY_BYTES))
        plots.save(path.with_name(f"{path.stem}-recall.png"), lambda: plots.over_budget(rows, longest, plots.RECALLED))
        print(f"written to {path}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
