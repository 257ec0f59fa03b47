"""The tables of docs/scaling.md, counted by the planner: `python -m benchmarks.scaling` prints them.

No time is measured here: operations and bytes are exact, and seconds are operations over a rate that is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from benchmarks.gpu import table as cards
from benchmarks.hotpath import ALLOCATIONS, CHUNK, FIRST, LATER, MOVED, NEEDED, OPERATORS
from benchmarks.report import RESULTS, figure, read
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


#: What was measured, and of which file it is which row.
CONSTANTS = (
    ("all of a chunk / the transformer's work, `pool`, `topk`", "overhead", "kvpack, pool, bf16", OVERHEAD),
    ("kernels that kvpack launches a layer and later step", "hotpath", "packforcing", f"{LATER}: {OPERATORS}"),
    ("the same in a chunk's first step", "hotpath", "packforcing", f"{FIRST}: {OPERATORS}"),
    ("the same in its first step, `int8`", "hotpath", "packforcing, int8", f"{FIRST}: {OPERATORS}"),
    ("tensors allocated in a later step", "hotpath", "packforcing", f"{LATER}: {ALLOCATIONS}"),
    ("bytes moved in a layer and later step / needed", "hotpath", "packforcing", f"{LATER}: {NEEDED}"),
    ("kernels of a whole chunk, a layer", "hotpath", "packforcing", f"{CHUNK}: {OPERATORS}"),
    ("bytes of a whole chunk, a layer", "hotpath", "packforcing", f"{CHUNK}: {MOVED}"),
    ("held / attended, own and archived tokens", "resident", "four-role stack, packforcing", "ratio"),
    ("time of a window's handling / FlashDreams'", "flashdreams", "kvpack, on read, bf16", "chunk / FlashDreams"),
    ("time of handling / PackForcing-Unofficial's way", "rivals", "kvpack, concatenate, bf16", "chunk / rival"),
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
    "constants": constants_table,
    "cards": cards_table,
}

if __name__ == "__main__":
    for name, make in TABLES.items():
        print(f"{name}\n\n{make()}\n")
