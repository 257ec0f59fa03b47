"""kvpack's window beside FlashDreams' on the card, as `benchmarks.flashdreams` does on a CPU."""

from __future__ import annotations

from functools import partial
from statistics import median
from types import ModuleType
from unittest.mock import patch

import torch

from benchmarks import flashdreams
from benchmarks.gpu.bench import one
from benchmarks.gpu.machine import Machine, milliseconds
from benchmarks.report import Row, samples
from kvpack import Geometry
from kvpack.memory import attended

LAYERS = 30
BUSY = "chunk, kernels and copies alone / FlashDreams"


def beside_flashdreams(machine: Machine, rows: list[Row], small: bool) -> str | None:
    """Append milliseconds of a chunk's handling on both sides, and their ratio, in one layer and in a model's."""
    module = flashdreams.flashdreams_cache()
    if module is None:
        return f"not measured, {flashdreams.ABSENT}"
    with torch.no_grad(), patch.object(attended, "rotate", flashdreams.no_queries):
        for layers in (1, LAYERS):
            shape = flashdreams.geometry(small, torch.bfloat16, layers)
            for on_read in (False, True):
                way = f"{'on read' if on_read else 'absolute'}, layers: {layers}"
                rows += _pair(machine, shape, module, on_read, way)
    return None


def _pair(machine: Machine, shape: Geometry, module: ModuleType, on_read: bool, way: str) -> list[Row]:
    steady = flashdreams.WINDOW // flashdreams.CHUNK + 1
    mine = flashdreams.Kvpack(shape, on_read)
    theirs = flashdreams.FlashDreams(shape, module, on_read, device=machine.device)
    spent: dict[str, list[float]] = {"kvpack": [], "FlashDreams": []}
    for chunk in range(steady + 5):
        given = flashdreams.projections(shape, chunk, machine.device)
        theirs.prepare()
        for name, side in (("kvpack", mine), ("FlashDreams", theirs)):
            seconds = machine.seconds(partial(side.chunk, given))
            if chunk >= steady:
                spent[name].append(seconds)
    flashdreams.assert_same(mine, theirs, shape)
    busy = machine.busy(partial(mine.chunk, given)), machine.busy(partial(theirs.chunk, given))
    rows = [samples(f"{name}, {way}", "chunk", milliseconds(each), "ms") for name, each in spent.items()]
    ratio = median(spent["kvpack"]) / median(spent["FlashDreams"])
    rows.append(one(f"kvpack, {way}", flashdreams.TIME, ratio, "ratio"))
    if busy[0] and busy[1]:  # idle to idle, a host that launches one thing after the other is all that counts
        rows.append(one(f"kvpack, {way}", BUSY, busy[0] / busy[1], "ratio"))
    return rows
