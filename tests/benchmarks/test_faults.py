"""The harness of faults runs, loses nothing, and would notice if it did."""

import pytest
import torch

from benchmarks import faults, report, snapshots
from benchmarks.report import Row


@pytest.mark.slow
def test_every_kind_of_fault_is_survived(tmp_path):
    rows = faults.run(small=True)
    assert report.read(report.write("faults", rows, tmp_path)) == rows
    assert all(bar.verdict(rows).startswith("met ") for bar in faults.BARS)
    tried = [row.value for row in rows if row.metric == "tried"]
    assert len(tried) == 12
    assert min(tried) >= 2


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
