"""The simulation of several cards against what can be said without one, and its kept figures."""

from dataclasses import replace

import pytest

from benchmarks import report, scaling, simulation
from benchmarks.simulation import Machine, formula, simulated

WORK = simulation.WORK
FREE = Machine(linear=1e9, attention=1e9, token_seconds=0.0, layer_seconds=0.0, message_seconds=0.0, bandwidth=1e30)


def test_its_operations_are_the_adapters():
    case = scaling.CASES[2]
    work, planned = scaling.work_of(case), case.planned(scaling.STEADY)
    flops = work.forwards * work.layers * (work.linear_flops + work.attention_flops)
    # The prompt's own projections are shared out as the rest; in all they are what the plan says.
    assert flops == planned.flops_per_chunk


def test_where_crossing_costs_nothing_time_is_divided():
    assert simulated(FREE, WORK, 4) == pytest.approx(simulated(FREE, WORK, 1) / 4)


def test_where_nothing_else_costs_it_is_the_formula():
    machine = replace(FREE, bandwidth=1e9)
    for ranks in (2, 4):
        paper = formula(WORK, ranks, simulated(machine, WORK, 1), 1e9)
        assert simulated(machine, WORK, ranks) == pytest.approx(paper)


def test_ranks_wait_for_the_last_one_and_a_host_for_its_launches():
    assert simulated(replace(FREE, spread=0.1), WORK, 4) > 1.05 * simulated(FREE, WORK, 4)
    slow = simulated(replace(FREE, launch_seconds=100.0), WORK, 4)
    assert slow == pytest.approx(100 * WORK.forwards * WORK.layers)


def test_the_card_has_the_forward_that_was_measured():
    assert simulated(scaling.h200(), scaling.work_of(scaling.CASES[0]), 1) == pytest.approx(5 * scaling.H200_FORWARD)


def test_the_kept_figures_are_within_their_bars():
    rows = report.read(report.RESULTS / "simulation.json")
    assert all(bar.verdict(rows).startswith("met ") for bar in simulation.BARS)
