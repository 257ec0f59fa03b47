"""`make gpu` without a GPU: each section runs, what does not depend on the machine holds, none stops another."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import flashdreams
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import beside, correctness, generation, kernels, whole
from benchmarks.gpu.bench import Bench, OutOfTime, alarm, one
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.video import FINISH, TINY, transformer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MACHINE = Machine(CPU)


def value(rows, metric):
    (found,) = [row.value for row in rows if row.metric == metric]
    return found


@pytest.fixture(scope="module")
def model():
    return transformer(TINY.transformer, CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("stack", "options"),
    [("packforcing", {}), ("packforcing", {"store": "int8", "tier": "host"}), ("deep-forcing", {})],
    ids=str,
)
def test_a_memory_holds_what_is_planned_and_its_phases_are_its_chunk(model, stack, options):
    rows = []
    generation.measured(rows, model, MACHINE, TINY, "it", stack, options)
    assert value(rows, "held: stats()['resident_bytes']") == value(rows, "held, as planned")
    phases = [row.value for row in rows if row.metric.startswith("chunk: ")]
    assert len(phases) == 5
    assert sum(phases) == pytest.approx(value(rows, "chunk"))
    assert value(rows, f"chunk: {FINISH}") > 0
    assert value(rows, generation.BARE) > 0
    assert [row.metric for row in rows][-1] == generation.OVERHEAD


def test_the_pipeline_is_stock_again_and_random_keys_were_those_of_the_whole_past(model):
    from benchmarks.gpu.video import Video, pipeline

    video = Video(pipeline(model), MACHINE, TINY, "packforcing")
    video.fill()
    session = video.session
    assert session.frames == TINY.frames - 4
    assert session.stack.selector.name == "softmax-mass"
    assert {cache.memory for cache in session.caches} == {session.stack}
    assert session.stats()["archive_blocks"] == (TINY.frames - 4 - 8 - 4) // 4
    latents = video.chunk()
    assert latents.isfinite().all()
    assert session.frames == TINY.frames
    video.close()
    assert not hasattr(video.pipe, "packforcing") or video.pipe.packforcing is None


def test_another_memory_is_told_from_a_rounding():
    """What the comparison allows a device in float16 is less than one block of the past."""
    name, options = correctness.MEMORIES["packforcing"]
    exact = correctness.outputs((name, options), CPU, torch.float32)
    half = correctness.error(correctness.outputs((name, options), CPU, torch.float16), exact)
    other = correctness.error(correctness.outputs((name, {**options, "topk": 1}), CPU, torch.float32), exact)
    assert 0 < correctness.TWICE * half < other


def test_a_device_that_computes_something_else_is_found_out(monkeypatch):
    monkeypatch.setattr(correctness, "MEMORIES", {"self-forcing": ("self-forcing", {})})
    real, calls = correctness.outputs, []

    def wrong(memory, device, dtype, compiled=None):
        made = real(memory, device, dtype)
        if compiled is None:
            return made
        calls.append(dtype)
        return made * (1.05 if dtype == torch.float16 else 1.0)

    monkeypatch.setattr(correctness, "outputs", wrong)
    rows = []
    note = correctness.rows_of(MACHINE, rows)
    assert calls == [torch.float32, torch.bfloat16, torch.float16]
    assert note is not None
    assert note.startswith("WRONG")
    assert note.endswith(": self-forcing, float16")
    assert value([row for row in rows if row.subject.endswith("float32")], correctness.EXACT) == 0


def test_rotation_is_that_of_a_cpu_and_decoding_follows_itself():
    rows = []
    assert kernels.rotation(MACHINE, rows, TINY, 64) is None
    assert {row.subject.split(", ")[1] for row in rows} == {"eager"}  # a kernel needs CUDA
    assert kernels.gathering(MACHINE, rows) == "only CUDA with Triton reads pinned memory by itself"
    whole.decoding(MACHINE, rows, TINY, torch.float32)
    assert value(rows, "pixel frames a second") > 0


def test_without_flashdreams_it_is_said(monkeypatch):
    monkeypatch.setattr(flashdreams, "flashdreams_cache", lambda: None)
    assert "not installed" in beside.beside_flashdreams(MACHINE, [], small=True)


def test_a_failed_section_leaves_the_others_and_what_it_had(tmp_path):
    bench = Bench(60.0, tmp_path / "gpu.json", {"card": "none"})

    def breaks(rows):
        rows.append(one("it", "before", 1, "ms"))
        raise RuntimeError("CUDA [error]: an illegal memory access")

    bench.section("first", 0.0, breaks)
    bench.section("second", 0.0, lambda rows: rows.append(one("it", "after", 2, "ms")))
    bench.section("third", 1e6, lambda rows: pytest.fail("there is no time for it"))
    written = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert [each["state"] for each in written] == ["failed", "measured", "skipped"]
    assert "illegal memory access" in written[0]["note"]
    assert written[0]["rows"][0]["metric"] == "before"
    assert "it may need" in written[2]["note"]
    with (tmp_path / "shown").open("w") as file:
        bench.show(Console(file=file, width=100))
    shown = (tmp_path / "shown").read_text()
    assert "CUDA [error]" in shown
    assert "after" in shown


def test_a_section_ends_with_the_budget(tmp_path):
    bench = Bench(0.2, tmp_path / "gpu.json", {})
    start = time.monotonic()
    bench.section("endless", 0.0, lambda rows: time.sleep(30))
    assert time.monotonic() - start < 10
    assert bench.sections[0].state == "failed"
    assert OutOfTime.__name__ in bench.sections[0].note
    with alarm(60):
        pass  # and none rings later


def test_without_cuda_it_says_so_at_once(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert command.main() == 2
    assert "--tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path, ready_python):
    code = "import runpy; runpy.run_module('benchmarks.gpu', run_name='__main__')"
    done = ready_python(code, "--tiny", "--out", tmp_path / "gpu.json", path=[ROOT])
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["machine"]["kvpack"]
    assert written["machine"]["torch"] == torch.__version__
    states = {section["name"]: section["state"] for section in written["sections"]}
    assert set(states.values()) == {"measured"}
    assert len(states) == 19
    rows = [row for section in written["sections"] for row in section["rows"]]
    found = {(row["subject"], row["metric"]): row["value"] for row in rows}
    errors = [error for (_, metric), error in found.items() if metric == correctness.ERROR]
    assert errors == [1.0] * len(errors)  # a CPU against itself
    assert all(held == found[name, "held, as planned"] for (name, metric), held in found.items() if "held: " in metric)
    assert "written to" in done.stdout
