"""Whether every stack still makes what it made: runs of all adapters on tiny pipelines, kept and compared.

    python -m benchmarks.fingerprints keep FOLDER
    python -m benchmarks.fingerprints compare FOLDER

`keep` writes FOLDER/fingerprints.json, for each run a hash, the error if it is refused and the counts of `stats()`, and
FOLDER/tensors.safetensors. `compare` runs all again and prints for each "same bits", "same error" or the largest
difference over the largest value. It ends with 1 if that is over the limit, if a run is missing, new or ends with
another error, or if a count differs. A run is `pipeline/stack/kind`, long enough for memories to overflow, in one
thread. What a CPU made can be compared with what a card makes: `--device cuda --limit 1e-3`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache, partial
from itertools import product, zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load, load_file, save, save_file

import kvpack
from kvpack.compressors.network import HighResolutionBranch
from kvpack.plugins.registry import registry
from kvpack.testing import tiny_anyflow_far_pipeline, tiny_sana_wm_refiner, tiny_skyreels_v2_pipeline, tiny_wan_pipeline

LIMIT, CHUNK, CHUNKS = 1e-6, 2, 14
ROWS = ["a red circle", "the blue square moving"]
TURNS = {"prompt": [(0, ROWS[0]), (2, ROWS[1]), (4, "a green triangle over grass", "cut")]}
SENT = {4: (ROWS[1], False), 9: ("a green triangle over grass", True)}
NOISE = torch.Generator().manual_seed(3)
IMAGE, CLIP = torch.rand(1, 3, 32, 48, generator=NOISE), torch.rand(1, 25, 3, 32, 48, generator=NOISE)
LATENTS, RAW = torch.randn(1, 16, 25, 4, 6, generator=NOISE), torch.randn(2, 4, 29, 2, 3, generator=NOISE)
GUIDED, LAST = {"guidance_scale": 3.0, "negative_prompt": "night"}, {"commit": "last-step"}
#: Small memories, for every stack that takes the option.
SIZES: dict[str, Any] = {
    "chunk_frames": CHUNK, "window_frames": 8, "sink_frames": 2, "recent_frames": 2, "budget_frames": 6, "topk": 3,
    "context_frames": 4, "archive_blocks": 6, "train_frames": 9, "max_queries": 7, "most_chosen": 2, "share": 0.4,
    "retrieved_frames": 2, "slots": 5,
    "previous_chunks": (4, 2), "deviations": 0.5, "compressor": "pool", "selector": "topk",
}  # fmt: skip
WAN = {
    "prompt": ROWS[0], "height": 32, "width": 48, "num_frames": 8 * CHUNKS - 3, "num_inference_steps": 2,
    "guidance_scale": 1.0, "max_sequence_length": 8, "output_type": "latent",
}  # fmt: skip
#: Arguments of the call, by pipeline.
CALLS: dict[str, dict[str, Any]] = {
    "wan": WAN, "anyflow": WAN, "skyreels": {**WAN, "causal_block_size": CHUNK, "fps": 16, "guidance_scale": 3.0},
    "sana": {"prompt": ROWS[0], "sana_latent": RAW[:1], "fps": 16.0, "block_size": CHUNK, "output_type": "latent"},
}  # fmt: skip
#: What is changed of them for every stack, by pipeline and kind of run.
EVERY: dict[str, dict[str, dict[str, Any]]] = {
    "wan": {"plain": {}, "guidance": GUIDED, "batch": {"prompt": ROWS}, "replay": TURNS,
            "image": {**TURNS, "image": IMAGE}, "clip": {**GUIDED, "video": CLIP},
            "3x5 tokens": {**TURNS, "height": 48, "width": 80}},
    "wan-bf16": {"guidance": {**GUIDED, **TURNS}}, "sana-wm": {"plain": {}, "replay": TURNS},
    "skyreels": {"plain": {}, "replay": {**TURNS, "num_videos_per_prompt": 2}},
    "skyreels-image": {"image": {"image": IMAGE}}, "skyreels-clip": {"clip": {"video": CLIP, "overlap_history": 9}},
    "anyflow": {"plain": {}, "replay": {**TURNS, "guidance_scale": 3.0}},
}  # fmt: skip
#: Memories whose sessions are of every kind.
SOME = ("deep-forcing", "framepack", "h2o", "krea", "longlive", "packforcing", "packforcing-paper", "token-trim")


@dataclass(frozen=True)
class Run:
    """One generation: what is special about it, a pipeline, a stack and what they are given."""

    kind: str
    pipe: str = "wan"
    stack: str = "packforcing"
    call: dict[str, Any] = field(default_factory=dict)  # beside `CALLS`
    options: dict[str, Any] = field(default_factory=dict)  # of the stack by name, beside `SIZES`
    data: dict[str, Any] = field(default_factory=dict)  # changes of a `Stack`, as in its `to_dict`
    kin: dict[str, Any] = field(default_factory=dict)  # class attributes, where the memory is no `Stack`
    first: int | None = None  # latent frames of the first chunk
    stream: bool = False  # chunk by chunk, under the prompts of `SENT`


def runs() -> Iterator[Run]:
    """Every stack in the same ways, some in more, and packforcing with every policy."""
    names = registry().names("stack")
    for pipe, ways in EVERY.items():
        yield from (Run(kind, pipe, name, call) for kind, call in ways.items() for name in names)
    doubtful = {"max_retries": 1, "veto": lambda _, state, latents: (latents.flatten(1).mean(dim=1) > 0, state)}
    for name in names:
        yield Run("last-step", "wan", name, TURNS, data=LAST, kin=LAST)
        yield Run("stream", "wan", name, GUIDED, stream=True)
        yield Run("first 1", "wan", name, TURNS, first=1)
        yield Run("veto", "wan", name, {"prompt": ROWS}, data={"archive_blocks": 2}, kin=doubtful)
    for name in SOME:
        yield Run("1x1 tokens", "wan", name, {**TURNS, "height": 16, "width": 16})
        yield Run("latents", "wan", name, {"latents": LATENTS, "num_frames": 97, "output_type": "pt"}, stream=True)
        yield Run("few steps", "wan-few", name, {"num_inference_steps": 4})
        yield Run("guidance", "wan-fused", name, {**GUIDED, **TURNS})
        yield Run("ends", "skyreels-image", name, {"image": IMAGE, "last_image": CLIP[:, 0]}, stream=True)
        yield Run("clip", "anyflow", name, {"video": CLIP[:, :9], "output_type": "pt"}, stream=True)
        yield Run("batch", "anyflow", name, {"prompt": ROWS}, data=LAST, kin=LAST)
        yield Run("batch", "sana-wm", name, {"sana_latent": RAW}, data=LAST, kin=LAST)
        yield Run("stream", "sana-wm-split", name, stream=True)
    others = [("token-trim", "deviations", -9.0), ("token-trim", "deviations", 0.0), ("krea", "past_bias", -1.0)]
    others += [("deep-forcing", "budget_frames", 0), ("longlive", "global_sink", False), ("magi", "clean_chunks", 3)]
    for name, *changed in [*others, ("memrope", "per_position", False)]:
        yield Run(f"{changed}", "wan", name, {**GUIDED, **TURNS, "num_videos_per_prompt": 2}, dict([changed]))
    yield Run("long", "wan", "packforcing-paper", {"height": 16, "num_frames": 397})  # selects of more than 16 blocks
    turns, rows = ({**GUIDED, "height": 48, "width": 144, **prompt} for prompt in (TURNS, {"prompt": ROWS}))
    for name, middle in product(registry().names("reindexer"), ("pool", "identity")):
        yield Run(f"reindex {name}, {middle}", call=turns, options={"reindexer": name, "compressor": middle})
    selectors = [{"policy": name, "topk": 2} for name in registry().names("selector") if name != "all"]
    selectors += [{**each, "after_rope": True} for each in selectors if each["policy"] in ("topk", "softmax-mass")]
    selectors += [{"policy": "all"}, {"policy": "random", "topk": 2, "seed": 7}]
    for chosen, how in product(selectors, ("layer", "chunk")):
        data = {"selector": chosen, "share_selection": how == "chunk"}
        yield Run(f"{[*chosen.values()]} {how}", call=rows, data=data)
    learnt = [{"policy": name, "project": how} for name, how in product(("lr", "hr", "dual"), ("layers", "direct"))]
    placed = [{"policy": name, "coordinates": how} for name in ("pool", "lr") for how in ("strided", "compact")]
    for middle, commit in product([*learnt, *placed, {"policy": "geometric", "levels": 2}], ("rerun", "last-step")):
        text, data = [*middle.values(), commit], {"compressor": middle, "commit": commit}
        yield Run(f"{text} stream", call=turns, data=data, stream=True)
        yield Run(f"{text} first 1", call=rows, data=data, first=1)
    for middle, pipe in product([*learnt, {"policy": "native", "project": "direct"}], ("skyreels", "anyflow")):
        yield Run(f"{[*middle.values()]}", pipe, call={**TURNS, "guidance_scale": 3.0}, data={"compressor": middle})
    numbers = [*product(("sink_frames", "recent_frames"), (0, 1, 3)), *product(["archive_blocks"], (0, 1, 3, None))]
    for option, value in (*numbers, *product(["topk"], (0, 1, 40)), *product(["chunk_frames"], (1, 3, 4))):
        yield Run(f"{option} {value}", call={**turns, "num_frames": 125}, options={option: value})
    yield from (Run(f"replay_frames {each}", call=turns, data={"replay_frames": each}) for each in (0, 3, 8))


RUNS = {f"{run.pipe}/{run.stack}/{run.kind}": run for run in runs()}


@cache
def pipeline(name: str, device: str) -> Any:
    """A tiny pipeline, the same in every process."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared
    if name.startswith("skyreels"):
        task = {"skyreels-image": "ImageToVideo", "skyreels-clip": "VideoToVideo"}.get(name, "")
        cls = getattr(diffusers, f"SkyReelsV2DiffusionForcing{task}Pipeline")
        pipe = tiny_skyreels_v2_pipeline(pipeline_class=cls, inject_sample_info=not task)
    elif name.startswith("sana"):
        pipe = tiny_sana_wm_refiner(rope_type="split" if name == "sana-wm-split" else "interleaved")
    elif name == "anyflow":
        pipe = tiny_anyflow_far_pipeline(chunk_partition=(1, *[CHUNK] * 10))
    else:
        pipe = tiny_wan_pipeline(scheduler=kvpack.FlowMatchFewStepScheduler() if name == "wan-few" else None)
        pipe.to(torch.bfloat16 if name == "wan-bf16" else torch.float32)
    if name == "wan-fused":
        pipe.transformer.fuse_qkv_projections()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def made(run: Run, pipe: Any, folder: str) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """What comes out, and the stats: at the end, or behind each chunk of a stream."""
    sizes = registry().taken(run.stack, SIZES)
    fits = run.options.get("reindexer", "fit" if run.stack == "packforcing" else "") == "fit"
    if run.stack in ("framepack", "full", "packforcing", "self-forcing") and not fits:
        sizes.pop("train_frames", None)  # of no effect there
    if run.pipe == "anyflow" and "compressor" not in run.options:
        sizes.pop("compressor", None)  # the family has its own
    if run.options.get("topk") == 0:
        sizes.pop("archive_blocks", None)
    kvpack.enable(pipe, run.stack, **{**sizes, **run.options})
    memory = pipe.packforcing.stack
    if run.data and isinstance(memory, kvpack.Stack):
        data, config = {**memory.to_dict(), **run.data}, pipe.transformer.config
        if data["compressor"]["policy"] in ("hr", "dual"):
            width = config.num_attention_heads * config.attention_head_dim
            branch = HighResolutionBranch(channels=16, width=width, patch=(2, 2), hidden=8, base_model="tiny")
            torch.nn.init.normal_(branch.projection.weight, generator=torch.Generator().manual_seed(1))
            branch.save_pretrained(folder)
            data["compressor"] = {**data["compressor"], "weights": folder}
        kvpack.enable(pipe, data)
    elif run.kin and not isinstance(memory, kvpack.Stack):
        options = {each.name: getattr(memory, each.name) for each in fields(memory)}
        kvpack.enable(pipe, type(memory.name, (type(memory),), run.kin)(**options))
    pipe.packforcing.first_chunk_frames = run.first
    call = {**CALLS[run.pipe.split("-")[0]], **run.call, "generator": torch.Generator().manual_seed(0)}
    if not run.stream:
        given = pipe(**call)
        return getattr(given, "frames", given), [pipe.packforcing.stats()]
    parts, stats, stream = [], [], pipe.packforcing.stream(**call)
    for index in range(stream.chunks or CHUNKS):
        prompt, cut = SENT.get(index, (None, False))
        parts.append(stream.send(prompt, cut=cut))
        stats.append(pipe.packforcing.stats())
    stream.close()
    return torch.cat(parts, dim=1 if call["output_type"] == "pt" else 2), stats


def result(name: str, device: str) -> tuple[dict[str, Any], bytes]:
    """Fingerprint and tensor of a run."""
    run, tensors, stats, error = RUNS[name], {}, [], None
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            tensor, stats = made(run, pipeline(run.pipe, device), folder)
            tensors = {name: tensor.cpu().contiguous()}
        except Exception as raised:  # what is refused, and how, stays the same too
            error = f"{type(raised).__name__}: {raised}".replace(folder, "FOLDER")
        kvpack.disable(pipeline(run.pipe, device))
    counts = [{key: n for key, n in each.items() if key == "selected" or isinstance(n, int)} for each in stats]
    data = save(tensors)
    return {"hash": hashlib.sha256(data).hexdigest(), "error": error, "counts": counts}, data


def verdict(old: Any, new: Any, before: Any, after: Any, limit: float) -> str:
    """What is said of a run, by its fingerprints and tensors; it begins with NOT where it is no longer the same."""
    if not old or not new:
        return "NOT run any more" if old else "NOT kept before"
    if old["error"] or new["error"]:
        return "same error" if old["error"] == new["error"] else f"NOT {old['error']}, but {new['error']}"
    if before.shape != after.shape:
        return f"NOT {tuple(before.shape)}, but {tuple(after.shape)}"
    distance = float((before.double() - after.double()).abs().max() / before.double().abs().max())
    words = "same bits" if old["hash"] == new["hash"] else f"{distance:.2g}"
    chunks = zip_longest(old["counts"], new["counts"], fillvalue={})
    differ = sorted({key for one, other in chunks for key in {*one, *other} if one.get(key) != other.get(key)})
    good = (words == "same bits" or distance <= limit) and all(key.endswith("_bytes") for key in differ)
    return ("" if good else "NOT ") + words + (f", but other {', '.join(differ)}" if differ else "")


def main() -> int:
    """The whole command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("keep", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of the names of the runs wanted")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where the runs are made (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="largest difference (default: %(default)s)")
    given = parser.parse_args()
    wanted = [name for name in RUNS if given.only in name]
    with get_context("spawn").Pool(given.processes) as pool:
        results = dict(zip(wanted, pool.imap(partial(result, device=given.device), wanted, chunksize=4), strict=True))
    prints = {name: each for name, (each, _) in results.items()}
    tensors = {name: each for _, data in results.values() for name, each in load(data).items()}
    words, numbers = given.folder / "fingerprints.json", given.folder / "tensors.safetensors"
    if given.action == "keep":
        given.folder.mkdir(parents=True, exist_ok=True)
        words.write_text(json.dumps(prints, indent=1))
        save_file(tensors, numbers)
        return 0
    kept, before = json.loads(words.read_text()), load_file(numbers)
    names = [name for name in {**kept, **prints} if given.only in name]
    tables = (kept, prints, before, tensors)
    said = {name: verdict(*(each.get(name) for each in tables), given.limit) for name in names}
    print(*(f"{name}: {each}" for name, each in said.items()), sep="\n")
    print(f"{len(said)} runs, {(bad := sum(each.startswith('NOT') for each in said.values()))} not the same")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
