"""Measure kvpack on this card in at most eight minutes, and write a file to send back.

Nothing is downloaded and no weights are needed: a small model for correctness against the CPU, and a transformer of
Wan2.1-1.3B's size with random weights, behind two minutes of video at 832x480. Sections come the most valuable first;
what there is no time for is skipped, and said. One that fails leaves the others alone. The file holds the name of the
card and the versions of torch, diffusers and kvpack, and nothing of yours.

The memory behind which a chunk is measured is filled with random keys and values, whose bytes and shapes are those of
a real video. "Keys in place" is the transformer alone, over as many keys, those of one layer in the place of all.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu import beside, correctness, generation, inside, kernels, whole
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.video import TINY, WAN, Size, transformer
from benchmarks.report import ROOT, Row

SECONDS = 8 * 60.0
KEYS = 27_872
#: Name, stack, options.
MEMORIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("packforcing", "packforcing", {}),
    ("self-forcing", "self-forcing", {}),
    ("deep-forcing", "deep-forcing", {}),
    ("packforcing, int8", "packforcing", {"store": "int8"}),
    ("packforcing, host", "packforcing", {"tier": "host"}),
    ("packforcing, int8, host", "packforcing", {"store": "int8", "tier": "host"}),
)


def measure(bench: Bench, machine: Machine, size: Size, small: bool) -> None:
    """Run all sections."""
    dtype, rest = torch.bfloat16, 0.0 if small else 1.0  # a small run needs next to no time
    bench.section("correctness against the CPU", 25 * rest, partial(correctness.rows_of, machine))
    bench.section("the same bits in every tier", 15 * rest, partial(correctness.tiers, machine))
    bench.section("limits of the card", 3 * rest, lambda rows: kernels.limits(machine, rows, size))
    tokens = KEYS if not small else 64
    bench.section("rotation", 3 * rest, lambda rows: kernels.rotation(machine, rows, size, tokens))
    bench.section("pinned memory", 3 * rest, lambda rows: kernels.gathering(machine, rows))
    models: list[Any] = []

    def model() -> Any:
        if not models:
            models.append(transformer(size.transformer, machine.device, dtype))
        return models[0]

    def memory(rows: list[Row], name: str, stack: str, options: dict[str, Any]) -> None:
        generation.measured(rows, model(), machine, size, name, stack, options)

    def compiled(rows: list[Row], mode: str | None, name: str, stack: str, options: dict[str, Any]) -> None:
        model().compile_repeated_blocks(fullgraph=True, backend=size.backend, **({"mode": mode} if mode else {}))
        memory(rows, name, stack, options)

    def eager(*memories: tuple[str, str, dict[str, Any]]) -> None:
        for name, stack, options in memories:
            run = partial(memory, name=name, stack=stack, options=options)
            bench.section(f"{name}, eager", 25 * rest, run)

    # Seconds are about twice what an H200 takes. What is compiled stays so, and comes last.
    eager(*MEMORIES[:3])
    bench.section("decoding", 5 * rest, lambda rows: whole.decoding(machine, rows, size, dtype))
    bench.section("inside a forward", 20 * rest, lambda r: inside.waits_and_allocations(machine, r, size, model()))
    bench.section("attention backends", 40 * rest, lambda rows: kernels.backends(machine, rows, size, model()))
    bench.section("beside FlashDreams", 5 * rest, lambda rows: beside.beside_flashdreams(machine, rows, small))
    eager(*MEMORIES[3:])
    for name, stack, options in (MEMORIES[0], MEMORIES[1]):
        run = partial(compiled, mode=None, name=f"{name}, compiled", stack=stack, options=options)
        bench.section(f"{name}, compiled", 40 * rest, run)
    backend = size.backend
    bench.section("correctness, compiled", 25 * rest, lambda rows: correctness.rows_of(machine, rows, backend))
    if backend == "inductor":
        run = partial(compiled, mode="reduce-overhead", name="packforcing, reduce-overhead", stack="packforcing")
        bench.section("packforcing, compiled for CUDA graphs", 40 * rest, partial(run, options={}))
    bench.section(
        "a whole video",
        75 * rest,
        lambda rows: whole.from_the_first_chunk(bench, machine, rows, size, model(), "compiled"),
    )


def main() -> int:
    """Return 1 if the device computes something else than the CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU; the figures mean nothing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the budget of time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu.json", help="the file (default: %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        print("there is no CUDA here, and a CPU would take hours; --tiny tries every section", file=sys.stderr)
        return 2
    machine = Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(options.seconds, options.out, machine.facts())
    measure(bench, machine, TINY if options.tiny else WAN, options.tiny)
    console = Console(width=max(110, Console().width))
    console.print({name: value for name, value in bench.facts.items() if value is not None})
    bench.show(console)
    console.print(f"written to {options.out}; this is the file to send back")
    return int(any(section.note.startswith("WRONG") for section in bench.sections))


if __name__ == "__main__":
    sys.exit(main())
