"""The leaderboard makes nothing twice, keeps nothing half, and its intervals are those of its captions and seeds."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import ablations, report
from benchmarks.leaderboard import __main__ as leaderboard
from benchmarks.leaderboard import bootstrap, figures, lengths, plots, rollout, sources, store, subjects, tables, work
from benchmarks.leaderboard.bootstrap import Interval
from benchmarks.leaderboard.subjects import Memory
from benchmarks.leaderboard.tasks import Settings, Task, fingerprint
from benchmarks.report import Score
from benchmarks.toyworld import world
from kvpack.errors import UnknownNameError
from kvpack.evaluation import METRICS, drift
from kvpack.shipped import shipped_folder
from kvpack.testing import tiny_wan_pipeline

SCORE = Score("packforcing", 5, "dynamic_degree", 0.5, 0.25, 1.0, 3, "python -m benchmarks.leaderboard", "abc")


@pytest.fixture
def task(tmp_path) -> Task:
    settings = Settings(shipped_folder(), 2, 3, 2, 2, video=False, alone=True, runs=tmp_path / "runs")
    return Task("packforcing", Memory("packforcing", "packforcing").stack(), 0, "weights", settings)


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """First scenes of the batches that were generated, by a generator of noise instead of the pipeline."""
    batches: list[int] = []

    def pieces(pipe, source, scenes, first, seconds, seed, steps):
        batches.append(first)
        draw = np.random.default_rng(seed)
        for count in (lengths.frames(1), 16 * (seconds - 1)):
            videos = draw.integers(0, 256, (len(scenes), count, 64, 64, 3), np.uint8)
            yield sources.BlockEntry(videos, np.array([0.5, 64.0, 1e6, float(first)]))

    monkeypatch.setattr(rollout, "pieces", pieces)
    return batches


def generated(pipe, stack, seconds, first=0, scenes=2) -> np.ndarray:
    parts = sources.pieces(pipe, stack, world.HELD_OUT[first : first + scenes], first, seconds, seed=3, steps=2)
    return np.concatenate([part.videos for part in parts], axis=1)


def test_a_long_video_begins_with_the_short_one() -> None:
    pipe, stack = tiny_wan_pipeline(), Memory("packforcing", "packforcing", {"sink_frames": 4}).stack()
    long, short = generated(pipe, stack, 3), generated(pipe, stack, 2)
    assert short.shape == (2, lengths.frames(2), 64, 64, 3)
    assert np.array_equal(long[:, : lengths.frames(2)], short)
    alone = generated(pipe, stack, 2, first=1, scenes=1)
    assert np.abs(alone[0].astype(int) - short[1]).max() <= 1
    assert not np.array_equal(short[0], short[1])


def test_the_same_task_is_made_once(task, made) -> None:
    assert work.run([task, replace(task, name="the same by another name")], processes=1) == {}
    assert made == [0, 2]
    assert work.run([task], processes=1) == {}
    assert made == [0, 2]
    kept = store.load(task.folder)
    assert [each.frames for each in kept.observations] == [lengths.frames(2)] * 3
    assert kept.costs.tolist() == [[0.5, 64.0, 1e6, pytest.approx(2 / 3)]] * 2
    assert kept.about["commit"]


@pytest.mark.parametrize(
    "change",
    [
        lambda task: replace(task, seed=1),
        lambda task: replace(task, weights="others"),
        lambda task: replace(task, source=replace(task.source, commit="last-step")),
        lambda task: replace(task, settings=replace(task.settings, seconds=3)),
        lambda task: replace(task, settings=replace(task.settings, steps=1)),
    ],
    ids=["seed", "weights", "stack", "seconds", "steps"],
)
def test_whatever_frames_depend_on_makes_another_result(task, change) -> None:
    assert change(task).folder != task.folder


def test_names_batches_and_processes_make_the_same_result(task) -> None:
    other = replace(task.settings, batch=1, alone=False)
    assert replace(task, name="other", settings=other).folder == task.folder


def test_a_killed_write_leaves_nothing_broken(task, made) -> None:
    def interrupted() -> None:
        with store.writing(task.folder) as part:
            (part / store.ABOUT).write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not rollout.finished(task)
    assert list(task.settings.runs.iterdir()) == []
    killed = task.settings.runs / f".{task.folder.name}.part"
    killed.mkdir()
    (killed / store.ABOUT).write_text("{")
    assert not rollout.finished(task)
    assert work.run([task], processes=1) == {}
    assert list(task.settings.runs.iterdir()) == [task.folder]
    assert len(store.load(task.folder).observations) == 3


def test_a_video_that_is_wanted_later_is_made(task, made) -> None:
    work.run([task], processes=1)
    wanted = replace(task, settings=replace(task.settings, video=True))
    assert not rollout.finished(wanted)
    work.run([wanted], processes=1)
    assert (task.folder / rollout.VIDEO).stat().st_size > 0
    assert rollout.finished(wanted)


def test_a_failure_costs_its_own_task_only(task, made, monkeypatch) -> None:
    pieces = rollout.pieces

    def failing(pipe, source, scenes, first, seconds, seed, steps):
        if seed == 1:
            raise ValueError("no such noise")
        return pieces(pipe, source, scenes, first, seconds, seed, steps)

    monkeypatch.setattr(rollout, "pieces", failing)
    broken = replace(task, seed=1)
    assert work.run([broken, task], processes=1) == {broken.folder: "ValueError: no such noise"}
    assert rollout.finished(task)
    assert not broken.folder.exists()


def test_fingerprint_is_of_the_weights(tmp_path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1")
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert fingerprint(tmp_path) == before
    (tmp_path / "a.safetensors").write_bytes(b"2")
    assert fingerprint(tmp_path) != before
    with pytest.raises(FileNotFoundError, match="no pipeline"):
        fingerprint(tmp_path / "nothing")


def test_interval_of_two_captions_is_that_of_a_coin() -> None:
    """Means of two draws of 0 and 1 are 0, 1/2 and 1, in a quarter, a half and a quarter of the resamples."""
    values = np.array([[0.0], [1.0]])
    drawn = bootstrap.means(values)
    shares = [float((drawn == mean).mean()) for mean in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    assert bootstrap.mean(values) == Interval(0.5, 0.0, 1.0, 2)
    assert np.array_equal(drawn, bootstrap.means(values))


def test_captions_are_clusters_and_seeds_vary_within() -> None:
    between = bootstrap.means(np.array([[0.0, 0.0], [1.0, 1.0]]))
    assert float((between == 0).mean()) == pytest.approx(1 / 4, abs=0.04)
    within = bootstrap.means(np.array([[0.0, 1.0], [0.0, 1.0]]))
    assert float((within == 0).mean()) == pytest.approx(1 / 16, abs=0.03)


def test_a_ratio_counts_returns_and_not_videos() -> None:
    scores, counts = np.array([[3.0], [0.0]]), np.array([[3.0], [1.0]])
    assert bootstrap.ratio(scores, counts).value == 0.75
    assert bootstrap.ratio(scores, np.zeros((2, 1))) is None
    same = bootstrap.ratio_difference((scores, counts), (scores, counts))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    none = (np.zeros((2, 1)), counts)
    apart = bootstrap.ratio_difference((scores, counts), none)
    assert (apart.value, apart.low, apart.high) == (0.75, 0, 1)


def test_what_cannot_be_said_is_left_out() -> None:
    assert bootstrap.mean(np.array([[np.nan, 2.0], [np.nan, np.nan]])) == Interval(2.0, 2.0, 2.0, 1)
    assert bootstrap.mean(np.full((3, 2), np.nan)) is None
    same = np.array([[2.0], [4.0]])
    assert bootstrap.ratio(same, same / 2) == Interval(2.0, 2.0, 2.0, 2)
    assert bootstrap.overlap(Interval(1, 0, 2, 1), Interval(3, 2, 4, 1))
    assert not bootstrap.overlap(Interval(1, 0, 2, 1), Interval(4, 3, 5, 1))


def test_lengths_are_whole_chunks() -> None:
    assert [lengths.frames(each) for each in (1, 5, 120)] == [13, 77, 1917]
    assert lengths.lengths(60) == (5, 30, 60)
    assert lengths.bins(10) == [(0, 77), (77, 157)]
    assert lengths.still_frames(5) == {0: 0, 5: 76}


def test_drift_is_that_of_the_evaluation(task, made) -> None:
    ten = replace(task, settings=replace(task.settings, seconds=15, captions=1))
    work.run([ten], processes=1)
    result = store.load(ten.folder)
    whole = figures.Measured("a", 15, [result]).whole(15)
    for name, value in drift(result.observations[0]).items():
        assert np.array_equal(whole[f"drift {name}"], [[value]], equal_nan=True), name


def test_differences_are_paired(task, made) -> None:
    work.run([task, replace(task, seed=1)], processes=1)
    results = [store.load(each.folder) for each in (task, replace(task, seed=1))]
    hero, rival = (figures.Measured(name, 2, results) for name in ("packforcing", "full"))
    rows = list(figures.differences(hero, rival))
    assert {row.subject for row in rows} == {"packforcing minus full"}
    assert all((row.value, row.low, row.high) == (0, 0, 0) for row in rows)


def test_scores_survive_their_file_and_are_merged(tmp_path) -> None:
    path = report.write("scores", [SCORE, replace(SCORE, subject="full")], tmp_path)
    better = replace(SCORE, value=0.75)
    assert report.merged(path, [better]) == [replace(SCORE, subject="full"), better]
    assert report.merged(tmp_path / "none.json", [SCORE]) == [SCORE]
    with pytest.raises(ValueError, match="not a row"):
        report.read(path)


def test_tables_mark_what_differs() -> None:
    rows = [
        replace(SCORE, value=0.9, low=0.8, high=1.0),
        replace(SCORE, subject="full", value=0.3, low=0.2, high=0.4),
        replace(SCORE, subject="packforcing minus full", value=0.6, low=0.5, high=0.7),
    ]
    page = tables.leaderboard(rows, ["packforcing", "full"], ["packforcing"])
    assert "| packforcing | 0.900 [0.800, 1.000] |" in page
    assert "**0.600 [0.500, 0.700]**" in page
    assert "~" not in page
    near = [rows[0], replace(rows[1], high=0.85), replace(rows[2], low=-0.1)]
    page = tables.leaderboard(near, ["packforcing", "full"], ["packforcing"])
    assert "0.600 [-0.100, 0.700] ~" in page


def test_labels_do_not_cover_each_other() -> None:
    moved = plots.apart([0.1, 0.5, 0.5, 0.51], 0.1)
    assert min(np.diff(moved)) >= 0.1 - 1e-9
    assert plots.apart([], 0.1) == []


def test_every_subject_of_the_kept_rows_can_be_made_again() -> None:
    known = {memory.name for memory in subjects.memories()} | set(subjects.REFERENCES)
    kept = report.read(report.RESULTS / "leaderboard.json", report.Score)
    assert {name for row in kept for name in row.subject.split(" minus ")} <= known


def test_every_subject_fits_and_an_unknown_option_is_named() -> None:
    names = [memory.name for memory in subjects.memories()]
    assert len(set(names)) == len(names)
    stacks = [memory.stack() for memory in subjects.memories()]
    assert {stack.chunk_frames for stack in stacks} == {4}
    with pytest.raises(UnknownNameError, match="speed"):
        Memory("a", "packforcing", {"speed": 2}).stack()


def test_every_ablation_changes_something() -> None:
    variants = [variant for each in ablations.ABLATIONS.values() for variant in each]
    assert len({variant.name for variant in variants}) == len(variants)
    for each in ablations.ABLATIONS.values():
        stacks = [json.dumps(variant.stack().to_dict()) for variant in each]
        assert len(set(stacks)) == len(stacks) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("script", "name"), [(leaderboard, "leaderboard"), (ablations, "ablation-commit")])
def test_small_runs(script, name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        sys, "argv", [name, "--smoke", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    )
    assert script.main() == 0
    assert "2 rollouts to make" in capsys.readouterr().err
    assert script.main() == 0
    assert "0 rollouts to make, 2 kept" in capsys.readouterr().err
    rows = report.read(tmp_path / "out" / f"{name}.json", Score)
    assert {row.metric for row in rows} >= set(METRICS[:3])
    assert {row.seconds for row in rows} == {2}
    assert all(row.command.startswith("python -m benchmarks.") and row.commit for row in rows)
    assert (tmp_path / "out" / f"{name}.md").read_text().startswith("# ")
