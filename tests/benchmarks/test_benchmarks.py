"""The benchmarks run, their rows have one shape, and what does not depend on the machine holds. Never on time."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from benchmarks import (
    anyflow,
    choices,
    clock,
    codecs,
    flashdreams,
    keeping,
    overhead,
    report,
    rotation,
    soak,
    steady,
    wan_layer,
)
from benchmarks.report import Bar, Row, Score

ROOT = Path(__file__).parents[2]
ROW = Row("kvpack", "error", 0.5, 0.25, 1.0, "ratio", 3, "python -m benchmarks.rotation", "abc")


def figures(rows: list[Row], subject: str, metric: str) -> list[float]:
    return [row.value for row in rows if row.subject.startswith(subject) and row.metric.startswith(metric)]


def assert_rows(rows: list[Row], bars: tuple[Bar, ...], folder: Path) -> None:
    """Every bar finds its figures, those that a small run can judge are kept, and the rows survive their file."""
    assert all(math.isfinite(number) for row in rows for number in (row.value, row.low, row.high))
    assert len({(row.subject, row.metric) for row in rows}) == len(rows)
    assert report.read(report.write("rows", rows, folder)) == rows
    for bar in bars:
        assert bar.verdict(rows).startswith("met " if not bar.timed else ("met ", "NOT MET")), bar


def test_codecs_hold_and_miss_what_their_bits_allow(tmp_path) -> None:
    rows = codecs.measure(small=True)
    assert_rows(rows, codecs.BARS, tmp_path)
    for metric in ("error of keys", "error of values"):
        for data in ("outliers", "toy"):
            int4, residual, int8 = (
                figures(rows, name, f"{metric}, {data}")[0] for name in ("int4", "residual", "int8")
            )
            assert int4 > residual > int8 > 0


def test_rotation_stays_within_two_roundings_and_repeated_rotation_does_not(tmp_path) -> None:
    rows = rotation.run(small=True)
    assert_rows(rows, rotation.BARS, tmp_path)
    assert max(figures(rows, "kvpack", "worst pair")) <= 1
    assert max(figures(rows, "kvpack", "relative error")) < 2**-8
    assert min(figures(rows, "plain", "worst pair")) > 4
    ten, hundred = figures(rows, "plain", "relative error")
    assert hundred > 5 * ten


def test_exact_rotation_preserves_length_and_distance() -> None:
    keys = torch.randn(1, 32, 2, 128, dtype=torch.float64)
    moved = rotation.exact(keys, 40_000.0)
    assert torch.allclose(moved.norm(dim=-1), keys.norm(dim=-1))
    near, far = (rotation.exact(keys, start) * rotation.exact(keys, start + 4) for start in (0.0, 40_000.0))
    assert torch.allclose(near.sum(dim=-1), far.sum(dim=-1), atol=1e-6)


def test_memory_of_packforcing_is_flat_and_that_of_full_grows(tmp_path) -> None:
    rows = steady.run(small=True)
    assert_rows(rows, steady.BARS, tmp_path)
    assert figures(rows, "packforcing", steady.SESSION) == [1]
    assert figures(rows, "length", steady.SESSION) == [1]
    assert figures(rows, "full", steady.SESSION)[0] > 1.1
    assert figures(rows, "length", "chunks without error") == [60]


@pytest.mark.slow
def test_a_chunk_of_anyflow_is_as_many_tokens_late_as_early_and_upstreams_are_more(tmp_path) -> None:
    rows = anyflow.run(small=True)
    assert_rows(rows, anyflow.BARS, tmp_path)
    assert figures(rows, "kvpack", anyflow.TOKENS) == [1]
    assert figures(rows, "upstream", anyflow.TOKENS)[0] > 2


def test_overhead_counts_the_same_attention_on_all_sides(tmp_path) -> None:
    rows = overhead.run(small=True)
    assert_rows(rows, overhead.BARS, tmp_path)
    assert figures(rows, "plain", "relative difference") == [0, 0]
    for kind in ("pool, fp32", "pool, bf16", "lr, fp32", "lr, bf16"):
        *parts, overall = [
            row
            for row in rows
            if row.subject == f"kvpack, {kind}" and row.unit == "ms" and "end to end" not in row.metric
        ]
        assert overall.metric == "overhead"
        assert sum(part.low for part in parts) <= overall.high * 1.001
        assert sum(part.high for part in parts) >= overall.low * 0.999


def test_keeping_measures_every_compressor_that_keeps(tmp_path) -> None:
    rows = keeping.run(small=True)
    assert_rows(rows, keeping.BARS, tmp_path)
    subjects = {row.subject.split(",")[0] for row in rows}
    assert subjects >= {*keeping.compressors(), "topk", "softmax-mass"}
    assert {row.subject for row in rows} >= {f"keep-farthest, 4 of 128, {name}" for name in ("fp32", "bf16")}


def test_reference_size_is_that_of_the_paper() -> None:
    geometry = wan_layer.WAN.geometry(torch.bfloat16)
    assert (wan_layer.WAN.width, geometry.rope_split) == (1536, (44, 42, 42))
    span = overhead.LowResolutionCompressor().span(0, wan_layer.FRAMES, geometry.grid)
    frames = wan_layer.SINK + wan_layer.RECENT + wan_layer.FRAMES
    assert frames * geometry.tokens_per_frame + wan_layer.TOPK * span.tokens == 27_872
    assert wan_layer.ARCHIVED > wan_layer.TOPK


def test_keys_in_place_give_the_output_of_kvpack() -> None:
    with torch.no_grad():
        layer = wan_layer.Layer(wan_layer.TINY, torch.float32, "pool")
        projections = layer.projections()
        layer.denoise(0)
        mine = layer.memory.attend(*projections, dispatch_attention_fn)
        assert torch.equal(mine, wan_layer.InPlace(layer, projections).attend(*projections, dispatch_attention_fn))


def test_clock_counts_inner_parts_once() -> None:
    watch = clock.Clock()
    with watch.part("outer"):
        with watch.part("inner", outer="outer"):
            pass
        with watch.part("leaf", leaf=True), watch.part("hidden"):
            pass
    assert set(watch.seconds) == {"outer", "inner", "leaf"}


def test_bar_is_judged_by_its_worst_row() -> None:
    bar = Bar("small", "kv", "err", 0.6)
    assert bar.verdict([ROW]).startswith("met ")
    assert bar.verdict([ROW, replace(ROW, value=0.7)]).startswith("NOT MET")
    assert "0.7" in bar.verdict([ROW, replace(ROW, value=0.7)])
    assert bar.verdict([replace(ROW, subject="plain")]).startswith("NOT MEASURED")


def test_samples_and_ratios() -> None:
    row = report.samples("a", "b", [3.0, 1.0, 2.0], "s")
    assert (row.value, row.low, row.high, row.n) == (2.0, 1.0, 3.0, 3)
    flat = report.median_ratio("a", "b", [2.0] * 5, [1.0] * 4)
    assert (flat.value, flat.low, flat.high, flat.n) == (2.0, 2.0, 2.0, 9)
    noisy = report.median_ratio("a", "b", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert noisy.low < 1 < noisy.high
    assert noisy == report.median_ratio("a", "b", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])


def test_table_shows_every_figure() -> None:
    shown = report.table([ROW, replace(ROW, metric="speed", value=12345.6)])
    assert shown.count("kvpack") == 1
    assert "12,346" in shown
    assert "0.25" in shown
    assert report.figure(0) == "0"
    assert report.figure(2.5e-5) == "2.5e-05"


@pytest.mark.parametrize(
    "broken",
    [{"value": 2.0}, {"n": 0}, {"extra": 1}],
    ids=["outside its interval", "no sample", "unknown field"],
)
def test_reading_refuses_what_is_no_row(tmp_path, broken) -> None:
    path = report.write("rows", [ROW], tmp_path)
    path.write_text(json.dumps([{**json.loads(path.read_text())[0], **broken}]))
    with pytest.raises(ValueError, match="not a row"):
        report.read(path)


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_kept_results_are_rows_of_full_runs(path) -> None:
    scored = ("leaderboard", "ablation", "compressors", "trained")
    rows = report.read(path, Score if path.stem.startswith(scored) else Row)
    assert rows
    assert all(row.commit and row.command for row in rows)
    assert all(row.command.startswith("python -m benchmarks.") for row in rows)
    assert not any(small in row.command for row in rows for small in ("--small", "--smoke"))


def test_a_soak_leaves_memory_and_files_as_they_are(tmp_path) -> None:
    kept = []
    rows = soak.run(small=True, keep=lambda rows: kept.append(len(rows)))
    assert_rows(rows, soak.BARS, tmp_path)
    assert kept == list(range(7, len(rows) + 1, 7))
    assert {row.subject.split(":")[0] for row in rows} == {"memory", "pipeline"}
    assert set(figures(rows, "", "chunks")) == {soak.SMALL_CHUNKS}


def test_a_soak_of_one_subject_keeps_the_rows_of_the_others(tmp_path, monkeypatch, capsys) -> None:
    other = report.Row("memory: another", "chunks", 1, 1, 1, "chunks", 1)
    report.write("soak", [other, replace(other, subject="memory: h2o", value=0, low=0)], tmp_path)
    words = ["--small", "--chunks", "20", "--only", "memory: h2o", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["soak", *words])
    soak.main()
    assert capsys.readouterr().out.startswith("Ten thousand chunks on end")
    rows = report.read(tmp_path / "soak.json")
    assert rows[0] == other
    assert len(rows) == 1 + 7
    assert {row.subject for row in rows[1:]} == {"memory: h2o"}
    assert figures(rows, "memory: h2o", "chunks") == [20]


def test_command_line_writes_rows_and_reports_bars(tmp_path) -> None:
    command = [sys.executable, "-m", "benchmarks.rotation", "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "met " in done.stdout
    assert "worst pair" in done.stdout
    rows = report.read(tmp_path / "rotation.json")
    assert {row.command for row in rows} == {"python -m benchmarks.rotation --small"}
    assert all(row.commit for row in rows)


def test_bench_runs_all_and_fails_if_one_cannot(tmp_path, monkeypatch, capsys) -> None:
    from benchmarks import __main__ as bench

    bars = {name: module.BARS for name, module in bench.BENCHMARKS.items()}

    def ran(name: str, small: bool, folder: str) -> bool:
        if name == "overhead":
            return False
        rows = {(bar.subject, bar.metric): replace(ROW, subject=bar.subject, metric=bar.metric) for bar in bars[name]}
        report.write(name, list(rows.values()), Path(folder))
        return True

    monkeypatch.setattr(flashdreams, "flashdreams_cache", lambda: None)
    monkeypatch.setattr(bench, "ran", ran)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--small", "--out", str(tmp_path)])
    assert bench.main() == 1
    shown = capsys.readouterr().out
    assert "rotation: met" in shown
    assert "steady: met" in shown
    assert "overhead: FAILED" in shown
    assert "flashdreams: skipped, it is not installed" in shown
    monkeypatch.setattr(bench, "ran", lambda *_: True)
    report.write("overhead", [replace(ROW, metric="overhead / own work")], tmp_path)
    assert bench.main() == 0


def test_small_runs_never_replace_kept_results() -> None:
    options = report.parser("").parse_args
    assert report.folder(options([])) == report.RESULTS
    assert report.folder(options(["--small"])) == report.SMALL_RESULTS
    assert report.folder(options(["--small", "--out", "here"])) == Path("here")


def test_choices_are_read_from_a_trace() -> None:
    ranges = [(0, 8, "sink"), (8, 4, "mid"), (20, 8, "mid"), (72, 4, "mid"), (76, 4, "recent")]
    few = {"first_frame": 12 + 4 * 15, "attended": [{"layer": 3, "frames": ranges}]}
    many = {**few, "first_frame": 12 + 4 * 17}
    chosen = choices.choices([few, many])  # with fewer than 16 blocks nothing is said
    assert chosen == {3: [choices.Choice(frozenset({0, 3, 4, 16}), of=17)]}
    assert chosen[3][0].newest() == 0.25
    drawn = choices.at_random(chosen, random.Random(0))[3][0]
    assert len(drawn.blocks) == 4
    assert drawn.of == 17
    assert max(drawn.blocks) < 17
    assert choices.distance(chosen[3][0], chosen[3][0]) == 0.0
