"""What saving costs a generation that is saved behind every tenth chunk, on the shipped pipeline.

The cost is the time of a save as a part of that of ten chunks, wall clock, decoding and the sync to disk included; low
and high are those of the cheapest and dearest save. "processor time" is the same without what other processes and the
disk take. "bytes written" are those of a save as a part of what the memory
holds: blocks of the snapshot before the last are not written again.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from diffusers import DiffusionPipeline

from benchmarks.report import SEED, Bar, Row, samples, say, script
from kvpack.shipped import demo_stack, shipped_folder

EVERY = 10
BARS = (Bar("saving every ten chunks costs at most 2 % of their time", "packforcing", "cost of a save", 0.02),)


def run(small: bool = False) -> list[Row]:
    """Cost of saving the stack that is the default, and one whose state is made anew in every chunk."""
    rows = []
    for name in ("packforcing", "memrope"):
        say(f"snapshots: {name}")
        rows += measured(name, 2 if small else 12)
    return rows


def measured(name: str, saves: int) -> list[Row]:
    """Cost and bytes of some saves of one stack."""
    pipe = DiffusionPipeline.from_pretrained(shipped_folder())
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_packforcing(demo_stack(name))
    generator = torch.Generator().manual_seed(SEED)
    costs, spent, written, chunks = [], [], [], []
    busy = 0.0  # seconds of the processor in all chunks
    with (
        tempfile.TemporaryDirectory() as folder,
        pipe.packforcing.stream(
            "a red circle bouncing over dusk rings", generator=generator, output_type="np"
        ) as stream,
    ):
        stream.save(folder)
        for _ in range(saves):
            for _ in range(EVERY):
                start, processor = time.perf_counter(), time.process_time()
                next(stream)
                chunks.append(time.perf_counter() - start)
                busy += time.process_time() - processor
            before = {path.name for path in Path(folder).iterdir()}
            start, processor = time.perf_counter(), time.process_time()
            stream.save(folder)
            costs.append(time.perf_counter() - start)
            spent.append(time.process_time() - processor)
            new = [path.stat().st_size for path in Path(folder).iterdir() if path.name not in before]
            written.append(sum(new) / pipe.packforcing.stats()["resident_bytes"])
    each_chunk = busy / len(chunks)
    return [
        samples(name, "processor time of a save", [each / (EVERY * each_chunk) for each in spent], "ratio"),
        samples(name, "cost of a save behind ten chunks", [each / (EVERY * median(chunks)) for each in costs], "ratio"),
        samples(name, "bytes written by a save", written, "ratio"),
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    script("snapshots", __doc__ or "", run, BARS)
