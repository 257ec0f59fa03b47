"""The harness of faults runs, loses nothing, and would notice if it did."""

import time
from random import Random

import pytest
import torch

from benchmarks import faults, report, snapshots
from benchmarks.report import Row


def drawing(folder):
    """What faults are drawn by, without the generation that they are done to."""
    made = object.__new__(faults.Faults)
    made.folder, made.small, made.draw = folder, True, Random(0)
    made.times = lambda _: 5
    return made


@pytest.mark.slow
def test_every_kind_of_fault_is_survived(tmp_path):
    rows = faults.run(small=True)
    assert report.read(report.write("faults", rows, tmp_path)) == rows
    assert all(bar.verdict(rows).startswith("met ") for bar in faults.BARS)
    tried = [row.value for row in rows if row.metric == "tried"]
    assert len(tried) == len(faults.kinds())
    assert min(tried) >= 2


def test_no_memory_at_some_operations(tmp_path):
    """The pipeline is the stock one, what ended is freed, and what goes on has the same bits."""
    tally = faults.memory.out_of_memory(drawing(tmp_path), "packforcing, int8 on the host")
    assert (tally.tried, tally.survived, tally.identical) == (5, 5, 5)


def test_what_is_left_behind_without_memory_is_noticed(tmp_path):
    pipe, script = faults.memory.starved_pipeline("h2o"), "save next next send"
    whole, scarce, _ = faults.memory.plenty(pipe, tmp_path / "whole", script)
    assert faults.memory.starved(pipe, tmp_path / "a", scarce.count - 200, -1, script) == (whole, False)


def test_clocks_that_jump_or_stand_still(tmp_path):
    tally = faults.clocks.jumping(faults.Faults(tmp_path, small=True), 3)
    assert (tally.tried, tally.survived, tally.identical) == (3, 3, 3)


@pytest.mark.parametrize("kind", faults.clocks.KINDS)
def test_the_clocks_are_other_ones_and_come_back(kind):
    before = time.time, time.monotonic, time.perf_counter_ns
    with faults.clocks.clocks(kind, Random(0)):
        looks = [abs(time.time() - time.time()) for _ in range(20)]
    assert (max(looks) == 0) == (kind is faults.clocks.stands_still)
    assert kind is faults.clocks.stands_still or max(looks) > 3600
    assert (time.time, time.monotonic, time.perf_counter_ns) == before


def test_other_bits_and_lost_generations_are_counted(tmp_path):
    tried = faults.Faults(tmp_path, small=True)
    tally = faults.Tally()
    tried.generate(tmp_path / "a", chunks=2)
    tried.whole[-1] = tried.whole[-1] + 1
    tried.check(tally, tmp_path / "a")
    assert (tally.tried, tally.survived, tally.resumed, tally.identical) == (1, 1, 1, 0)
    assert not faults.BARS[1].verdict(tally.rows("a")).startswith("met ")
    assert faults.BARS[0].verdict([Row("a", "lost", 1, 1, 1, "faults", 1)]).startswith("NOT MET")
    assert torch.equal(tried.whole[0], next(tried.stream()))


@pytest.mark.slow
def test_the_cost_of_saving_is_measured(tmp_path):
    rows = snapshots.run(small=True)
    assert report.read(report.write("snapshots", rows, tmp_path)) == rows
    assert all(row.value > 0 for row in rows)
