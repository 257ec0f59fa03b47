"""The tables of docs/scaling.md, counted by the planner: `python -m benchmarks.scaling` writes them into the page.

No time is measured here: operations and bytes are exact, and seconds are operations over a rate that is assumed; of one
video over several cards they are simulated (`benchmarks.simulation`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import table as cards
from benchmarks.hotpath import ALLOCATIONS, CHUNK, FIRST, LATER, MOVED, NEEDED, OPERATORS
from benchmarks.report import RESULTS, figure, read
from benchmarks.simulation import Machine, Work, formula, simulated
from kvpack.planning.planner import Plan, plan
from kvpack.planning.presets import PRESETS, adapter_for
from kvpack.plugins.registry import registry

MODELS = {"1.3B": "wan2.1-t2v-1.3b", "14B": "wan2.1-t2v-14b"}
SIZES = {"480p": (480, 832), "720p": (720, 1280)}
LENGTHS = {"5 s": 5, "1 min": 60, "2 min": 120, "10 min": 600, "1 h": 3600, "24 h": 86400}
GPUS = (1, 2, 4, 8, 16, 32, 64)
#: Operations a second that a card is assumed to reach in the transformer.
RATE = 400e12
#: Latent frames a second of video, and denoising steps.
FRAMES, STEPS = 4, 4
OVERHEAD = "overhead / own work"
#: Latent frames behind which nothing grows any more: two minutes and a half.
STEADY = 600


@dataclass(frozen=True)
class Case:
    """A model at a size.

    Args:
        model: its name in the tables.
        size: likewise.
    """

    model: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.model}, {self.size}"

    @property
    def configs(self) -> Any:
        return PRESETS[MODELS[self.model]].configs

    @property
    def adapter(self) -> Any:
        return adapter_for(PRESETS[MODELS[self.model]])

    def geometry(self) -> Any:
        return self.adapter.geometry(self.configs, *SIZES[self.size], torch.bfloat16)

    def planned(self, frames: int, stack: str = "packforcing", **options: Any) -> Plan:
        """Return the plan of a video; of a bounded memory its cost is that at `STEADY` frames for ever."""
        return _planned(self, frames, stack, tuple(options.items()))

    def weights(self) -> int:
        """Return the bytes of the transformer."""
        from diffusers import WanTransformer3DModel

        with torch.device("meta"):
            model = WanTransformer3DModel(**self.configs["transformer"])
        return 2 * sum(each.numel() for each in model.parameters())

    def video_flops(self, seconds: int) -> float:
        """Return the operations of a whole video: each chunk's, behind as much past as it has."""
        chunks, chunk = seconds * FRAMES // 4, self.planned(STEADY).chunk_tokens
        forward = partial(self.adapter.forward_flops, self.configs)
        tokens = [self.planned(4 * (index + 1)).attended_tokens for index in range(min(chunks, 24))]
        first = sum(forward(chunk, each) for each in tokens)
        return (STEPS + 1) * (first + max(0, chunks - 24) * forward(chunk, tokens[-1]))

    def full_flops(self, seconds: int) -> float:
        """Return the same where every chunk attends all of the past."""
        chunks, chunk = seconds * FRAMES // 4, self.planned(STEADY).chunk_tokens
        forward = partial(self.adapter.forward_flops, self.configs)
        return (STEPS + 1) * sum(forward(chunk, chunk * (index + 1)) for index in range(chunks))


CASES = [Case(model, size) for model in MODELS for size in SIZES]


@cache
def _planned(case: Case, frames: int, stack: str, options: tuple[tuple[str, Any], ...]) -> Plan:
    flops = partial(case.adapter.forward_flops, case.configs)
    return plan(case.geometry(), registry().stack(stack, dict(options)), frames, steps=STEPS, flops=flops)


def gigabytes(count: float) -> str:
    """Return bytes, three digits, as people say them."""
    return f"{count / 1e12:,.3g} TB" if count >= 1e12 else f"{count / 1e9:.3g} GB"


def duration(seconds: float) -> str:
    """Return seconds in the unit that people would use."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:.3g} s"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return Markdown."""
    return "\n".join(f"| {' | '.join(each)} |" for each in (head, ["---"] * len(head), *rows))


def chunks_table() -> str:
    """Return what a chunk costs behind a full context."""
    rows = []
    for case in CASES:
        dense, small = case.planned(STEADY), case.planned(STEADY, store="int8", tier="host")
        seconds = dense.flops_per_chunk / RATE
        rows.append(
            [
                case.name,
                f"{dense.chunk_tokens:,}",
                f"{dense.attended_tokens:,}",
                f"{dense.flops_per_chunk / 1e12:,.0f}",
                f"{seconds:.2f} s",
                f"{16 / seconds:.3g}",
                gigabytes(case.weights()),
                gigabytes(dense.resident_kv_bytes),
                gigabytes(small.resident_kv_bytes),
                gigabytes(small.archive_kv_bytes),
            ]
        )
    head = ["model, size", "tokens a chunk", "attended", "TFLOP a chunk", "time", "frames a second", "weights"]
    return table([*head, "held, dense", "held, int8 on the host", "on the host"], rows)


def lengths_table() -> str:
    """Return what a whole video costs on one card."""
    rows = []
    for name, seconds in LENGTHS.items():
        cells = [duration(case.video_flops(seconds) / RATE) for case in CASES]
        rows.append([name, f"{seconds * FRAMES // 4:,}", *cells])
    return table(["video", "chunks", *(case.name for case in CASES)], rows)


def full_table() -> str:
    """Return what the same videos would cost if all of the past were attended, of the smallest case."""
    case, rows = CASES[0], []
    for name, seconds in LENGTHS.items():
        frames = seconds * FRAMES
        theirs = case.geometry().kv_bytes_per_token * frames * case.geometry().tokens_per_frame
        mine = case.planned(min(frames, STEADY)).resident_kv_bytes
        times = (case.video_flops(seconds), case.full_flops(seconds))
        rows.append([name, gigabytes(mine), gigabytes(theirs), *(duration(each / RATE) for each in times)])
    return table(["video", "`packforcing` holds", "`full` would hold", "`packforcing`", "`full`"], rows)


def gpus_table() -> str:
    """Return frames a second of as many videos as there are cards."""
    rows = []
    for count in GPUS:
        rates = [count * 16 / (case.planned(STEADY).flops_per_chunk / RATE) for case in CASES]
        rows.append([str(count), *(f"{each:,.3g}" for each in rates)])
    return table(["GPUs", *(case.name for case in CASES)], rows)


#: Measured on an H200 (torch 2.11, eager, bfloat16): operations a second of a large product, and a bare forward of the
#: 1.3B model at 480p behind a full context, from which attention and all else have their rate.
H200_LINEAR, H200_FORWARD = 750e12, 0.1075
#: Assumed: bytes a second out of a card, seconds of a message, and of a host that launches a layer; the spread of an
#: operation's time where it is not 0.
NVLINK, MESSAGE, LAUNCH, SPREAD = 450e9, 5e-6, 3e-4, 0.05
#: Cards that make one video together, as far as they divide its heads.
SPLITS = (1, 2, 4, 6, 8, 12, 20, 40)


def work_of(case: Case) -> Work:
    """Return a chunk of a case behind a full context."""
    config, planned = case.configs["transformer"], case.planned(STEADY)
    return Work(
        layers=config["num_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        ffn=config["ffn_dim"],
        tokens=planned.chunk_tokens,
        attended=planned.attended_tokens,
        text=512,
        forwards=STEPS + 1,
        itemsize=2,
    )


def h200(spread: float = 0.0) -> Machine:
    """Return a card."""
    work = work_of(CASES[0])
    left = H200_FORWARD / work.layers - work.linear_flops / H200_LINEAR
    rate = work.attention_flops / left
    return Machine(H200_LINEAR, rate, 0.0, 0.0, MESSAGE, NVLINK, launch_seconds=LAUNCH, spread=spread)


def split_table() -> str:
    """Return the chunks of one video over several cards, simulated, and beside the formula."""
    rows = []
    for case in CASES:
        work = work_of(case)
        alone = simulated(h200(), work, 1)
        for ranks in (each for each in SPLITS if work.heads % each == 0):
            smooth, uneven = (simulated(h200(spread), work, ranks) for spread in (0.0, SPREAD))
            paper = formula(work, ranks, alone, NVLINK)
            cells = [f"{1000 * each:,.0f} ms" for each in (smooth, paper, uneven)]
            part = f"{100 * alone / smooth / ranks:.0f} %"
            rates = 16 / smooth, 16 / smooth * (GPUS[-1] // ranks)
            rows.append([case.name, str(ranks), *cells, part, *(f"{each:,.3g}" for each in rates)])
    head = ["model, size", "GPUs a video", "simulated", "formula", "uneven", "of linear", "frames a second"]
    return table([*head, f"of {GPUS[-1]} GPUs"], rows)


def simulation_table() -> str:
    """Return what the kept results say of the simulation."""
    rows: dict[str, dict[str, float]] = {}
    for row in read(RESULTS / "simulation.json"):
        rows.setdefault(row.subject, {})[row.metric] = row.value
    asked = ("measured", "simulated", "off", "formula / measured")
    cells = [[name, *(figure(each[metric]) for metric in asked)] for name, each in rows.items() if "measured" in each]
    return table(["a chunk in", "measured, s", "simulated, s", "off", "formula / measured"], cells)


#: What was measured, and of which file it is which row.
CONSTANTS = (
    ("all of a chunk / the transformer's work, `pool`, `topk`", "overhead", "kvpack, pool, bf16", OVERHEAD),
    ("kernels that kvpack launches a layer and later step", "hotpath", "packforcing", f"{LATER}: {OPERATORS}"),
    ("the same in a chunk's first step", "hotpath", "packforcing", f"{FIRST}: {OPERATORS}"),
    ("the same in its first step, `int8`", "hotpath", "int8, packforcing", f"{FIRST}: {OPERATORS}"),
    ("tensors allocated in a later step", "hotpath", "packforcing", f"{LATER}: {ALLOCATIONS}"),
    ("bytes moved in a layer and later step / needed", "hotpath", "packforcing", f"{LATER}: {NEEDED}"),
    ("kernels of a whole chunk, a layer", "hotpath", "packforcing", f"{CHUNK}: {OPERATORS}"),
    ("bytes of a whole chunk, a layer", "hotpath", "packforcing", f"{CHUNK}: {MOVED}"),
    ("held / attended, own and archived tokens", "resident", "four-role stack, packforcing", "ratio"),
    ("time of a window's handling / FlashDreams'", "flashdreams", "kvpack, on read, bf16", "chunk / FlashDreams"),
    ("time of handling / PackForcing-Unofficial's way", "rivals", "kvpack, concatenate, bf16", "chunk / rival"),
    ("bytes of it that pass a cache of 8 MiB / the same", "rivals", "kvpack, concatenate, bf16", "to memory / rival"),
    ("bytes of it, as CUDA kernels / the same", "rivals", "kvpack, concatenate, bf16", "as kernels / rival"),
)


def constants_table() -> str:
    """Return what the kept results say."""
    rows = []
    for text, name, subject, metric in CONSTANTS:
        kept = read(RESULTS / f"{name}.json")
        (value,) = [row.value for row in kept if (row.subject, row.metric) == (subject, metric)]
        rows.append([text, figure(value), f"`python -m benchmarks.{name}`"])
    return table(["constant", "value", "from"], rows)


def cards_table() -> str:
    """Return what cards have said."""
    return table(cards.HEAD, cards.rows())


TABLES = {
    "chunk": chunks_table,
    "length": lengths_table,
    "full": full_table,
    "gpus": gpus_table,
    "split": split_table,
    "simulation": simulation_table,
    "constants": constants_table,
    "cards": cards_table,
}

#: Where they are read.
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def filled(text: str) -> str:
    """Return a page's text with its tables counted anew, each known by its head."""
    for name, make in TABLES.items():
        counted = make()
        head = re.escape(counted.split("\n", 1)[0])
        text, found = re.subn(rf"^{head}\n(\|.*\n)+", lambda _, new=counted: f"{new}\n", text, flags=re.MULTILINE)
        if found != 1:
            raise ValueError(f"the page has {found} tables with the head of {name!r}, it needs one: {head}")
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
