"""The page on scaling says what the planner counts."""

import re

import pytest

from benchmarks import scaling

TEXT = scaling.PAGE.read_text()


@pytest.mark.parametrize("name", scaling.TABLES)
def test_the_tables_of_scaling_are_what_is_planned(name):
    assert scaling.TABLES[name]() in TEXT, "stale: python -m benchmarks.scaling writes them anew"


def test_a_page_with_old_figures_is_filled_anew():
    old = re.sub(r"(kernels of a whole chunk, a layer) \| \d+", r"\1 | 1", TEXT)
    assert old != TEXT
    assert scaling.filled(old) == TEXT
    with pytest.raises(ValueError, match="0 tables with the head of 'constants'"):
        scaling.filled(TEXT.replace("| constant | value |", "| constants | value |"))


def test_its_formula_is_that_of_the_plan():
    """Operations, and bytes of what is held, by the words of the page."""
    case = scaling.CASES[0]
    layers, w, f, q, k = 30, 1536, 8960, 6240, 27_872
    forward = 2 * layers * (q * (6 * w * w + 2 * w * f) + 2 * w * (w * 512 + q * (k + 512)))
    planned = case.planned(scaling.STEADY)
    assert planned.flops_per_chunk == 5 * forward
    assert planned.attended_tokens == k
    assert case.geometry().kv_bytes_per_token == 4 * layers * w
    # Attended tokens, archived blocks, with sums of keys and places, and one layer's keys for all.
    blocks = 128
    layer = 2 * 2 * w * (k + blocks * 182) + blocks * (4 * w + 182 * 12)
    assert planned.resident_kv_bytes == layers * layer + 2 * w * k
