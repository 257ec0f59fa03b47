"""The leaderboard makes anew what changed code would make otherwise, and shows what was asked for."""

import builtins
import inspect
import shlex
import sys
from io import BytesIO

import numpy as np
from PIL import Image

from benchmarks.leaderboard import __main__ as leaderboard
from benchmarks.leaderboard import lamps, plots, subjects, tasks
from benchmarks.leaderboard.plots import COLOURS
from benchmarks.leaderboard.subjects import Memory
from benchmarks.leaderboard.tasks import Settings, Task, code
from benchmarks.report import Score
from kvpack.evaluation import METRICS
from kvpack.policies import topk
from kvpack.shipped import shipped_folder


def task(tmp_path, name="packforcing", **options):
    settings = Settings(shipped_folder(), 2, 3, 2, 2, video=False, alone=True, runs=tmp_path / "runs")
    return Task(name, Memory(name, name, options).stack(), 0, "weights", settings)


def rows(*names):
    return [
        Score(name, 5 * end, metric, 0.5, 0.4, 0.6, 3, "", "") for name in names for end in (1, 2) for metric in METRICS
    ]


def test_changed_code_of_a_policy_makes_another_rollout(tmp_path, monkeypatch):
    packed, window = task(tmp_path), task(tmp_path, "streaming-llm")
    before = packed.folder, window.folder
    real = inspect.getsource

    def changed(thing):
        return real(thing) + "# changed\n" * (thing is topk)

    monkeypatch.setattr(tasks.inspect, "getsource", changed)
    assert packed.folder != before[0]
    assert window.folder == before[1]  # it has no such selector


def test_another_version_makes_another_rollout(tmp_path, monkeypatch):
    before = task(tmp_path).folder
    monkeypatch.setattr(tasks, "__version__", "0.2.0")
    assert task(tmp_path).folder != before


def test_every_memory_has_its_code():
    hashes = {each.name: code(each.stack()) for each in subjects.memories()}
    assert all(hashes.values())
    assert hashes["h2o"] != hashes["flowcache"]
    assert code("truth") == ""


def colours_of(picture):
    seen = np.asarray(Image.open(BytesIO(picture)).convert("RGB")).reshape(-1, 3)
    return {f"#{r:02X}{g:02X}{b:02X}" for r, g, b in np.unique(seen, axis=0)}


def test_what_was_asked_for_is_plotted_with_a_legend(monkeypatch):
    pages = []
    monkeypatch.setattr(plots, "_png", lambda page: pages.append(page) or b"")
    names = [f"subject {index}, of many" for index in range(9)]
    plots.over_time(rows(*names), names, "title")
    (page,) = pages
    assert [text.get_text() for text in page.legends[0].get_texts()] == names
    assert len({(line.get_color(), line.get_linestyle()) for line in page.axes[0].lines}) == 9


def test_subjects_of_ones_own_are_drawn(tmp_path):
    path = tmp_path / "plot.png"
    leaderboard._plot(rows("krea", "packforcing"), ["krea"], path)
    found = colours_of(path.read_bytes())
    assert COLOURS[0] in found
    assert COLOURS[1] not in found


def test_walls_are_not_drawn_of_what_would_say_nothing(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(leaderboard, "SMOKE", subjects.REFERENCES)
    monkeypatch.setattr(lamps, "timeline", lambda shown, _: drawn.extend(each.name for each in shown) or b"")
    words = ["leaderboard", "--smoke", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", words)
    assert leaderboard.main() == 0
    assert drawn == ["truth"]


def test_without_a_plotting_library_it_ends_well(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    leaderboard._plot(rows("krea"), ["krea"], tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []
    assert "plot.png was not drawn: matplotlib is not installed" in capsys.readouterr().err


def test_names_with_commas_can_be_copied_to_the_shell():
    names = [each.name for each in subjects.memories()]
    assert any("," in name for name in names)
    assert shlex.split(leaderboard.listed(names)) == names
