"""Benchmarks of what a memory holds, moves and costs without a model: their counts, and the results that are kept."""

import os

import pytest
import torch

from benchmarks import bookkeeping, flashdreams, report, resident
from kvpack.plugins.registry import registry


def figures(rows, subject, metric):
    return [row.value for row in rows if row.subject == subject and row.metric == metric]


def held(name, heads):
    return resident.held(registry().stack(name, {}), resident.geometry(heads, small=True), 24)


def test_heads_are_continued_to_what_is_measured():
    for name in ("packforcing", "deep-forcing", "memrope"):
        one, two, three = (held(name, heads) for heads in (1, 2, 3))
        for each in ("resident", "workspace", "attended", "chunk", "archive"):
            first, second, third = (getattr(held, each) for held in (one, two, three))
            assert third == 2 * second - first, (name, each)


def test_the_collector_finds_what_stats_does_not_count(monkeypatch):
    assert held("self-forcing", 1).uncounted < 1000
    stats = resident.Session.stats
    monkeypatch.setattr(resident.Session, "stats", lambda session: {**stats(session), "resident_bytes": 0})
    assert held("self-forcing", 1).uncounted > 10_000


def test_kept_figures_are_of_every_stack_and_within_the_bars():
    rows = report.read(report.RESULTS / "resident.json")
    assert {row.subject.split(", ")[-1] for row in rows} == set(registry().names("stack"))
    assert all(bar.verdict(rows).startswith("met ") for bar in resident.BARS)
    for row in rows:
        if row.metric == "ratio":
            whole, *parts = (
                figures(rows, row.subject, name)[0]
                for name in ("resident_bytes", "attended_and_chunk_bytes", "archive_bytes")
            )
            assert row.value == pytest.approx(whole / sum(parts))
    rows = report.read(report.RESULTS / "flashdreams.json")
    assert all(bar.verdict(rows).startswith("met ") for bar in flashdreams.BARS)


def test_moved_bytes_are_those_read_and_written():
    numbers, room = torch.ones(8), torch.zeros(8)
    with flashdreams.Moved() as moved:
        numbers.view(2, 4)
        numbers.reshape(4, 2)
    assert moved.nbytes == 0
    with flashdreams.Moved() as moved:
        room.copy_(numbers)  # reads 32 bytes, writes 32
    assert moved.nbytes == 64
    with flashdreams.Moved() as moved:
        torch.mul(numbers, numbers, out=room)  # reads two, writes one
        room.add_(numbers)  # reads two, writes one
    assert moved.nbytes == 2 * 96


def test_without_the_other_cache_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(flashdreams, "flashdreams_cache", lambda: None)
    with pytest.raises(SystemExit, match="nothing measured, it is not installed"):
        flashdreams.run(small=True)


@pytest.mark.parametrize("on_read", [False, True])
@torch.no_grad()
def test_the_window_is_what_its_last_chunks_were(on_read):
    shape = flashdreams.geometry(True, torch.float32)
    side, given = flashdreams.Kvpack(shape, on_read), [flashdreams.projections(shape, each) for each in range(10)]
    for each in given:
        side.chunk(each)
    keys, values = side.attended
    assert torch.equal(values, torch.cat([each[2] for each in given[-flashdreams.WINDOW // flashdreams.CHUNK :]], 1))
    assert keys.shape == values.shape
    assert side.resident() >= 2 * keys.nbytes


@pytest.mark.slow
def test_a_checkout_costs_what_it_costs(tmp_path, python, monkeypatch):
    def run(words, cwd, env, **_):
        code = f"import runpy; runpy.run_path({words[1]!r}, run_name='__main__')"
        done = python(code, *words[2:], folder=cwd, path=env["PYTHONPATH"].split(os.pathsep))
        done.check_returncode()
        return done

    monkeypatch.setattr(bookkeeping.subprocess, "run", run)
    rows = bookkeeping.run(report.ROOT, ["packforcing", "memrope"], turns=2, chunks=8)
    assert report.read(report.write("rows", rows, tmp_path)) == rows
    assert len(figures(rows, "four-role stack, packforcing", bookkeeping.RATIO)) == 1
    assert 0.3 < figures(rows, "other memory, memrope", bookkeeping.RATIO)[0] < 3
