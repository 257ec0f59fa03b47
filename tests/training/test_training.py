"""`kvpack train-compressor` from a folder of clips to weights that a pipeline takes."""

import csv
import io
import json
import os
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import kvpack.plugins.registry
from helpers import forked, told
from kvpack.checkpoints.config import Settings
from kvpack.compressors.network import HighResolutionBranch
from kvpack.errors import BrokenClipError, InvalidOptionError, OutputError, TrainingError
from kvpack.media import files
from kvpack.media.video import VideoWriter
from kvpack.testing import tiny_wan_pipeline
from kvpack.testing.ranks import run_ranks
from kvpack.training.clips import ClipFolder
from kvpack.training.compressor import CompressorTraining, frozen
from kvpack.training.log import append_log
from kvpack.training.recipe import TrainingRecipe
from kvpack.training.trainer import Learner, Trainer

CHUNKS, SIZE = 5, (8, 8)
STACK = {"topk": 4, "sink_frames": 2, "recent_frames": 2, "chunk_frames": 2}
CAPTIONS = ["a red circle", "the blue square", "a green triangle"]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps precision for the process; each of these tests stands for one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def write_clips(folder, name="clips", captions=CAPTIONS, frames=2 * CHUNKS, size=SIZE, seed=0, channels=16):
    folder.mkdir(exist_ok=True)
    source = torch.Generator().manual_seed(seed)
    save_file(
        {"latents": torch.randn(len(captions), channels, frames, *size, generator=source)},
        folder / f"{name}.safetensors",
    )
    (folder / f"{name}.txt").write_text("\n".join(captions) + "\n")
    return folder


def write_video(path, shape, fps=16):
    frames = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    with VideoWriter(path, fps) as writer:
        writer.write(frames)
    path.with_suffix(".txt").write_text("a red circle\n")


def trainee_of(model):
    return kvpack.plugins.registry.registry().adapters["wan"].trainee(frozen(model, torch.float32, "cpu"), 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("data"))


@pytest.fixture
def training(model, data, tmp_path):
    def make(output="run", recipe=None, **changed):
        steps = {"steps": 4, "save_every": 2, "learning_rate": 1e-3, **(recipe or {})}
        given = {"options": STACK, "hidden": 8, "frames": 2 * CHUNKS, "denoising_steps": 2, "max_sequence_length": 8}
        return CompressorTraining(
            **{"model": model, "data": data, "output": tmp_path / output, "cpu": True, **given, **changed},
            recipe=TrainingRecipe(**steps),
        )

    return make


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def rows(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_trained_weights_are_taken_by_a_pipeline(training, model, tmp_path):
    training().run()
    trained = weights(tmp_path / "run")
    assert float(trained["projection.weight"].abs().max()) > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["base_model"] == "tiny"
    assert config["branches"] == "dual"
    losses = [float(row["value"]) for row in rows(tmp_path / "run") if row["name"] == "loss"]
    assert len(losses) == 4
    assert all(loss > 0 for loss in losses)
    pipe = frozen(model, torch.float32, "cpu")
    call = {"prompt": "a red circle", "height": 64, "width": 64, "num_frames": 37, "num_inference_steps": 2}
    call |= {"guidance_scale": 1.0, "max_sequence_length": 8, "output_type": "latent"}
    made = {}
    for compressor in ("lr", str(tmp_path / "run")):
        pipe.enable_packforcing(compressor=compressor, **STACK)
        made[compressor] = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
    lr, dual = made.values()
    assert torch.equal(lr[:, :, :6], dual[:, :, :6])  # nothing compressed is attended yet
    assert not torch.equal(lr, dual)


def test_going_on_gives_the_same_weights(training, tmp_path, monkeypatch):
    """Stopped at any step, a run ends where it would have."""
    training("whole").run()
    advance, left = Trainer._advance, 3

    def stopped(self):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Trainer, "_advance", stopped)
    with pytest.raises(KeyboardInterrupt):
        training("cut").run()
    monkeypatch.undo()
    assert len([row for row in rows(tmp_path / "cut") if row["name"] == "loss"]) == 3
    training("cut").run()
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")


def words(model, data, output, steps, *more):
    """The command line of `training`."""
    given = ["train-compressor", "--model", model, "--data", data, "--output", output, "--steps", steps]
    given += ["--learning-rate", 1e-3, "--hidden", 8, "--frames", 2 * CHUNKS, "--denoising-steps", 2]
    given += ["--max-sequence-length", 8, "--cpu", *(f"-o{name}={value}" for name, value in STACK.items()), *more]
    return list(map(str, given))


@pytest.mark.slow
def test_two_processes_are_an_accumulation_of_two(training, model, data, tmp_path):
    with socket.create_server(("localhost", 0)) as free:
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in ("0", "1"):  # as torch.distributed.run starts them
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **meeting}
        given = words(model, data, tmp_path / "two", 3)
        processes.append(forked(*given, told=tmp_path / f"told-{rank}", **place))
    for rank, process in enumerate(processes):
        process.join()
        assert process.exitcode == 0, (tmp_path / f"told-{rank}").read_text()
    training("one", {"steps": 3, "save_every": 3, "accumulation": 2}).run()
    assert json.loads((tmp_path / "two" / "recipe.json").read_text())["processes"] == 2
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_killed_process_goes_on(training, model, data, tmp_path):
    """The same with a process that has no time to say goodbye."""
    command, kills = words(model, data, tmp_path / "cut", 12, "--save-every", 1), 0
    for pause in (0.0, 0.3, None):
        process = forked(*command, told=tmp_path / "told")
        before = (tmp_path / "cut" / "state.pt").stat().st_mtime_ns if (tmp_path / "cut" / "state.pt").exists() else 0
        while pause is not None and process.is_alive():
            state = tmp_path / "cut" / "state.pt"
            if state.exists() and state.stat().st_mtime_ns != before:
                time.sleep(pause)
                process.kill()
                kills += 1
                break
            time.sleep(0.01)
        process.join()
    assert kills == 2
    assert process.exitcode == 0, (tmp_path / "told").read_text()
    training("whole", {"steps": 12, "save_every": 1}).run()
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_divergence_keeps_the_last_checkpoint(training, tmp_path, monkeypatch):
    from kvpack.training.distillation import ContextDistillation

    training(recipe={"steps": 2}).run()
    kept = weights(tmp_path / "run"), (tmp_path / "run" / "state.pt").read_bytes()
    backward = ContextDistillation.backward

    def poisoned(self, step, *rest):
        told = backward(self, step, *rest)
        return {"loss": float("nan")} if step == 3 else told

    monkeypatch.setattr(ContextDistillation, "backward", poisoned)
    with pytest.raises(TrainingError, match=r"diverged at step 4: loss is nan; the checkpoint of step 2 .* is kept"):
        training(recipe={"steps": 6, "save_every": 2}).run()
    assert_same(kept[0], weights(tmp_path / "run"))
    assert (tmp_path / "run" / "state.pt").read_bytes() == kept[1]


def test_a_gradient_that_is_not_finite_stops_it(training, monkeypatch):
    from kvpack.training.distillation import ContextDistillation

    backward = ContextDistillation.backward

    def poisoned(self, *given):
        told = backward(self, *given)
        self.compressor.projection.weight.grad[0, 0] = float("inf")
        return told

    monkeypatch.setattr(ContextDistillation, "backward", poisoned)
    with pytest.raises(TrainingError, match=r"step 1: compressor gradient norm is .*there is no checkpoint yet"):
        training().run()


def test_going_on_from_trained_weights(training, tmp_path):
    training("first").run()
    training("second", {"steps": 1, "learning_rate": 1e-30}, initial=str(tmp_path / "first")).run()
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    with pytest.raises(InvalidOptionError, match=r"initial .* has hidden=8, but hidden=4 was asked for; give hidden=8"):
        training("third", initial=str(tmp_path / "first"), hidden=4).run()
    with pytest.raises(InvalidOptionError, match="no compressor folder"):
        training("third", initial=str(tmp_path / "nowhere")).run()


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({"branches": "hr"}, {}, "has branches=hr, but branches=dual was asked for; give branches=hr"),
        ({"project": "direct"}, {}, "has project=direct, but project=layers was asked for"),
        ({"options": {**STACK, "coordinates": "strided"}}, {}, "has coordinates=strided, but coordinates=centered"),
        ({}, {"options": {**STACK, "coordinates": "strided"}}, "has coordinates=centered, but coordinates=strided"),
    ],
)
def test_trained_weights_go_on_as_they_were_used(first, second, told, training, tmp_path):
    training("first", {"steps": 1}, **first).run()
    with pytest.raises(InvalidOptionError, match=rf"initial .* {told}"):
        training("second", initial=str(tmp_path / "first"), **second).run()


def test_the_models_own_memory_is_trained_in(training, model, tmp_path):
    """And the compressor is for chunks of its length, not for others."""
    own, run = tmp_path / "own", tmp_path / "run"
    shutil.copytree(model, own)
    Settings("packforcing", {**STACK, "keep_tokens": 2}).write(own)
    training(recipe={"steps": 1}, model=own, options={"topk": 3, "coordinates": "strided"}).run()
    trained = json.loads((run / "recipe.json").read_text())["stack"]
    assert (trained["chunk_frames"], trained["partitioner"]["sink_frames"], trained["selector"]["topk"]) == (2, 2, 3)
    config = json.loads((run / "config.json").read_text())
    assert (config["chunk_frames"], config["coordinates"]) == (2, "strided")
    pipe = frozen(own, torch.float32, "cpu")
    pipe.enable_packforcing(compressor=str(run))
    assert pipe.packforcing.stack.chunk_frames == 2
    with pytest.raises(InvalidOptionError, match=r"was trained in chunks of 2 latent frames, but chunk_frames is 4"):
        pipe.enable_packforcing("packforcing", compressor=str(run), chunk_frames=4)
    Settings("packforcing", {**STACK, "sink_frames": 4}).write(own)
    with pytest.raises(TrainingError, match="holds another training"):  # the folder says another memory by now
        training(model=own, options={"topk": 3, "coordinates": "strided"}).run()
    training("other", {"steps": 1}, model=own, stack="packforcing", options=STACK).run()
    assert json.loads((tmp_path / "other/recipe.json").read_text())["stack"]["partitioner"]["sink_frames"] == 2


def test_another_training_is_not_gone_on_with(training, tmp_path):
    training(recipe={"steps": 2}).run()
    with pytest.raises(TrainingError, match="holds another training"):
        training(recipe={"steps": 4, "learning_rate": 1.0}).run()
    training(recipe={"steps": 4}).run()  # longer is the same training
    assert max(int(row["step"]) for row in rows(tmp_path / "run")) == 4


def test_another_model_is_another_training(training, model, tmp_path):
    training(recipe={"steps": 1}).run()
    tiny_wan_pipeline(seed=1).save_pretrained(tmp_path / "other")
    shutil.copytree(model, tmp_path / "moved")
    for changed in ({"model": tmp_path / "other"}, {"max_sequence_length": 4}):
        with pytest.raises(TrainingError, match="holds another training"):
            training(recipe={"steps": 2}, **changed).run()
    training(recipe={"steps": 2}, model=tmp_path / "moved", base_model="tiny").run()  # where it lies is all the same


def test_gradients_in_float16_are_unscaled_once(monkeypatch, tmp_path):
    """Of two learners, as those of a compressor and its critic."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1))
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    modules = {name: torch.nn.Linear(2, 1, bias=False) for name in ("compressor", "critic")}

    class Both:
        learners = [Learner(name, module) for name, module in modules.items()]

        def backward(self, step, clips, source, backward):
            for module in modules.values():
                accelerator.scaler.scale(module.weight.sum()).backward()
            if step == 1:
                modules["compressor"].weight.grad[:] = torch.inf
            return {"loss": 1.0}

    clips = SimpleNamespace(fingerprint=lambda: "", __len__=lambda: 1)
    trainer = Trainer(Both(), clips, TrainingRecipe(steps=2, clip_norm=10.0), tmp_path, accelerator)
    monkeypatch.setattr(trainer, "_batch", lambda turn: [])
    told = trainer._advance()
    assert [told[f"{name} gradient norm"] for name in modules] == pytest.approx([2**0.5] * 2)
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    told = trainer._advance()  # one of them overflows: its step alone is passed over, and the scale shrinks
    assert told["critic gradient norm"] == pytest.approx(2**0.5)
    assert torch.equal(modules["compressor"].weight, before["compressor"])
    assert not torch.equal(modules["critic"].weight, before["critic"])
    assert accelerator.scaler.get_scale() == 1024.0


class Alternating:
    """An objective of a learner in every step, and one in every third only."""

    def __init__(self):
        self.modules = {name: torch.nn.Linear(1, 1, bias=False) for name in ("often", "seldom")}
        self.learners = [Learner("often", self.modules["often"]), Learner("seldom", self.modules["seldom"], 0.5)]
        for module in self.modules.values():
            torch.nn.init.ones_(module.weight)

    def backward(self, step, clips, source, backward):
        for name, module in self.modules.items():
            if name == "often" or step % 3 == 0:
                backward(module.weight.square().sum())
        return {"loss": 1.0}

    def rates(self, folder, steps, schedule):
        """The rate of each step of each learner, and the weights behind them."""
        clips, found = SimpleNamespace(fingerprint=lambda: ""), {name: {} for name in self.modules}
        recipe = TrainingRecipe(steps=steps, learning_rate=1.0, schedule=schedule, warmup=2)
        trainer = Trainer(self, clips, recipe, folder, Accelerator(cpu=True))
        trainer._batch = lambda turn: []
        for name, optimiser in trainer.optimisers.items():
            optimiser.optimizer.register_step_pre_hook(
                lambda used, *_, name=name: found[name].update({trainer.step: used.param_groups[0]["lr"]})
            )
        trainer.run()
        return found, {name: module.weight.detach() for name, module in self.modules.items()}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup", "polynomial"])
def test_every_learner_has_the_rate_of_the_run_s_step(schedule, tmp_path):
    """However few steps it takes, and as the whole run has it where a shorter one goes on."""
    whole, last = Alternating().rates(tmp_path / "whole", 12, schedule)
    assert list(whole["often"]) == list(range(12))
    assert whole["seldom"] == pytest.approx({step: 0.5 * whole["often"][step] for step in (0, 3, 6, 9)}, rel=1e-5)
    assert whole["often"][1] == pytest.approx(0.5)
    assert whole["often"][2] == pytest.approx(1)
    if schedule == "cosine":
        assert whole["often"][7] == pytest.approx(0.5)
    first, _ = Alternating().rates(tmp_path / "cut", 5, schedule)
    then, longer = Alternating().rates(tmp_path / "cut", 12, schedule)
    assert list(first["often"]) == list(range(5))
    for name in ("often", "seldom"):
        assert then[name] == {step: rate for step, rate in whole[name].items() if step >= 5}
    if schedule == "constant_with_warmup":
        assert longer == last


class Halves:
    """An objective of two modules whose gradients are the turn: even turns reach the first, odd ones the second."""

    def __init__(self):
        self.modules = torch.nn.ModuleList(torch.nn.Linear(2, 1, bias=False) for _ in range(3))
        for module in self.modules:
            torch.nn.init.ones_(module.weight)

    @property
    def learners(self):
        return [Learner("both", self.modules[:2]), Learner("none", self.modules[2])]

    def backward(self, step, clips, source, backward):
        (turn,) = clips
        backward(self.modules[turn % 2].weight.sum() * (turn + 1))
        return {"loss": 1.0}

    def trained(self, folder, accumulation=1, steps=3):
        """The weights, and what the last step logged."""
        clips = SimpleNamespace(fingerprint=lambda: "")
        recipe = TrainingRecipe(steps=steps, accumulation=accumulation, learning_rate=0.1)
        trainer = Trainer(self, clips, recipe, folder, Accelerator(cpu=True))
        trainer._batch = lambda turn: [turn]
        trainer.run()
        told = {row["name"]: float(row["value"]) for row in rows(folder)}
        return [each.weight.detach() for each in self.modules], told


def in_two_processes(work, monkeypatch):
    def told(rank):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        return work(rank)

    return run_ranks(2, told, seconds=60)


@pytest.mark.parametrize("blind", [0, 1])
def test_processes_that_do_not_see_the_same_checkpoint(blind, tmp_path, monkeypatch):
    """As those of two nodes that do not share the folder."""
    in_two_processes(lambda rank: Halves().trained(tmp_path / "run", steps=2), monkeypatch)
    before = {each.name: each.read_bytes() for each in (tmp_path / "run").iterdir()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.csv").write_text("step,name,value\n")

    def work(rank):
        with pytest.raises(TrainingError) as caught:
            Halves().trained(tmp_path / ("other" if rank == blind else "run"))
        return str(caught.value)

    seen = {0: "process 0 at step 0, process 1 at step 2", 1: "process 0 at step 2, process 1 at step 0"}[blind]
    for message in in_two_processes(work, monkeypatch):
        assert f"state.pt: with theirs {seen}; give a folder that all nodes share" in message
    assert {each.name: each.read_bytes() for each in (tmp_path / "run").iterdir()} == before
    assert [each.name for each in (tmp_path / "other").iterdir()] == ["log.csv"]


def test_processes_whose_batches_reach_different_weights(tmp_path, monkeypatch):
    """Half of the weights have no gradient in each of them, and all take the steps of an accumulation of two."""
    two = in_two_processes(lambda rank: Halves().trained(tmp_path / "two"), monkeypatch)
    weights, told = Halves().trained(tmp_path / "one", 2)
    assert told.keys() == {"loss", "both gradient norm"}
    assert torch.equal(weights[2], torch.ones(1, 2))
    for got, logged in two:
        assert logged == pytest.approx(told)
        for one, other in zip(weights, got, strict=True):
            torch.testing.assert_close(other, one)


class MeanLatent:
    """An objective without noise: its gradient is the mean latent of a batch."""

    def __init__(self):
        self.module = torch.nn.Linear(1, 1, bias=False)
        self.seen = []

    @property
    def learners(self):
        return [Learner("module", self.module)]

    def backward(self, step, clips, source, backward):
        self.seen += [clip.name for clip in clips]
        loss = torch.stack([self.module.weight.sum() * clip.latents.mean() for clip in clips]).mean()
        backward(loss)
        return {"loss": float(loss.detach())}


def test_accumulation_is_a_larger_batch(model, data, tmp_path):
    clips, found = ClipFolder(data, trainee_of(model), 2 * CHUNKS, 16), []
    for batch, accumulation in ((1, 4), (2, 2), (4, 1)):
        torch.manual_seed(0)
        objective = MeanLatent()
        recipe = TrainingRecipe(steps=3, batch=batch, accumulation=accumulation, learning_rate=0.1, clip_norm=1e9)
        Trainer(objective, clips, recipe, tmp_path / str(batch), Accelerator(cpu=True)).run()
        found.append((objective.seen, objective.module.weight.detach()))
    for seen, weight in found[1:]:
        assert seen == found[0][0]
        torch.testing.assert_close(weight, found[0][1])
    assert len(found[0][0]) == 12
    assert {name: found[0][0].count(name) for name in found[0][0]} == {clip.name: 4 for clip in clips}


def test_a_full_disk_keeps_the_last_checkpoint(training, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            return super().write(data[: 50_000 - self.tell()])  # none behind it, as the system never says

    training("whole").run()
    training(recipe={"steps": 2}).run()
    kept = (tmp_path / "run" / "state.pt").read_bytes()
    assert len(kept) > 50_000
    monkeypatch.setattr(files, "open", lambda path, mode, buffering: Full(path, "w+"), raising=False)
    with pytest.raises(OutputError, match=r"state\.pt: No space left on device; nothing of it was kept"):
        training().run()
    monkeypatch.undo()
    assert (tmp_path / "run" / "state.pt").read_bytes() == kept
    training().run()
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


@pytest.mark.parametrize(
    ("ends", "error"), [(KeyboardInterrupt, KeyboardInterrupt), (SafetensorError("No space left"), OutputError)]
)
def test_weights_that_are_being_written_replace_none(ends, error, training, tmp_path, monkeypatch):
    """A pipeline may read them meanwhile."""

    def half(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise ends

    training(recipe={"steps": 2}).run()
    (tmp_path / "run" / "README.md").write_text("mine")
    kept = {each.name: each.read_bytes() for each in (tmp_path / "run").iterdir() if each.name != "log.csv"}
    monkeypatch.setattr(HighResolutionBranch, "_save_pretrained", half)
    with pytest.raises(error):
        training().run()
    assert {each.name: each.read_bytes() for each in (tmp_path / "run").iterdir() if each.name != "log.csv"} == kept
    monkeypatch.undo()
    training().run()
    training("whole").run()
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert (tmp_path / "run" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("left", ["", "step,na", "{log}3,lo\n\n", "{log}1,loss,0.", "\0\0\0\0\n"])
def test_a_log_that_a_crash_has_damaged_stops_nothing(left, training, tmp_path):
    training(recipe={"steps": 2}).run()
    log = tmp_path / "run" / "log.csv"
    before = rows(tmp_path / "run") if "{log}" in left else []
    log.write_text(left.format(log=log.read_bytes().decode()), newline="")
    training(recipe={"steps": 3}).run()
    now = rows(tmp_path / "run")
    assert now[: len(before)] == before
    assert [(row["step"], row["name"]) for row in now[len(before) :]] == [
        ("3", "loss"),
        ("3", "compressor gradient norm"),
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_log_on_a_full_disk_is_one_line():
    with pytest.raises(OutputError, match="cannot write /dev/full: No space left on device; the last checkpoint"):
        append_log(Path("/dev/full"), 1, {"loss": 1.0})


@pytest.mark.parametrize("left", [0, 100, -100])
def test_a_state_that_cannot_be_read_is_named(left, training, tmp_path):
    training(recipe={"steps": 2}).run()
    state = tmp_path / "run" / "state.pt"
    state.write_bytes(state.read_bytes()[:left])
    with pytest.raises(TrainingError, match=r"state\.pt cannot be read \(.+\); put a copy .* --initial .*run"):
        training().run()
    (tmp_path / "run" / "recipe.json").unlink()
    with pytest.raises(TrainingError, match="holds another training"):
        training().run()
    state.unlink()
    training(recipe={"steps": 2}).run()
    assert {row["step"] for row in rows(tmp_path / "run")} == {"1", "2"}


@pytest.mark.parametrize("broken", ["_save", "weights"])
def test_killed_while_it_saves(broken, training, tmp_path, monkeypatch):
    """At its very end, between the weights and the state: the next run makes up for what is missing."""

    def killed(*_):
        raise KeyboardInterrupt

    training("whole").run()
    training("cut", {"steps": 2}).run()
    target = Trainer if broken == "_save" else CompressorTraining
    monkeypatch.setattr(target, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        training("cut").run()
    monkeypatch.undo()
    training("cut").run()
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_schedule_that_ends_above_the_rate_is_refused_at_once():
    with pytest.raises(InvalidOptionError, match="schedule polynomial does not go with a rate of 5e-08"):
        TrainingRecipe(schedule="polynomial", learning_rate=1e-7)


def test_a_video_that_cannot_be_opened_is_skipped(model, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "b-bad.mp4").mkdir()
    (folder / "b-bad.txt").write_text("a red circle\n")
    clips = ClipFolder(
        folder, trainee_of(model), 2 * CHUNKS, 16, cache=tmp_path / "cache", size=(64, 64), broken="skip"
    )
    assert any("b-bad.mp4 cannot be read" in each for each in clips.skipped)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"frames": 4}, "has 2 latent frames"),
        ({"channels": 8}, "has 8 latent channels, but the model has 16"),
        ({"size": (4, 8)}, "its latents are 4x8"),
        ({"captions": [*CAPTIONS, ""]}, "3 captions for 4 clips"),
    ],
)
def test_a_broken_clip_is_named_or_skipped(changed, told, model, data, tmp_path):
    folder = write_clips(tmp_path / "data", "a-good")
    write_clips(folder, "b-bad", **{"frames": 2 * CHUNKS, **changed, **({"frames": 2} if "frames" in changed else {})})
    trainee = trainee_of(model)
    with pytest.raises(BrokenClipError, match=rf"b-bad.*{told}.*let broken clips be skipped"):
        ClipFolder(folder, trainee, 2 * CHUNKS, 16)
    clips = ClipFolder(folder, trainee, 2 * CHUNKS, 16, broken="skip")
    assert len(clips) == 3
    assert len(clips.skipped) in (1, 3)
    assert all(told in each for each in clips.skipped)
    assert [clip.name for clip in clips[:2]] == ["a-good.safetensors[0]", "a-good.safetensors[1]"]


def test_clips_have_the_size_of_most_of_them_or_the_one_asked_for(model, tmp_path):
    folder = write_clips(tmp_path / "data", "a-odd", ["a red circle"], size=(4, 8))
    write_clips(folder, "b-most")
    clips = ClipFolder(folder, trainee_of(model), 2 * CHUNKS, 16, broken="skip")
    assert [clip.name for clip in clips] == [f"b-most.safetensors[{row}]" for row in range(3)]
    told = "a-odd.safetensors, clip 0: its latents are 4x8, but those of most clips are 8x8"
    assert clips.skipped == [told]
    with pytest.raises(BrokenClipError, match=told):
        ClipFolder(folder, trainee_of(model), 2 * CHUNKS, 16)
    clips = ClipFolder(folder, trainee_of(model), 2 * CHUNKS, 16, size=(32, 64), broken="skip")
    assert [clip.name for clip in clips] == ["a-odd.safetensors[0]"]
    assert clips.skipped[0].endswith("are 8x8, but a height and width of 32x64 pixels ask for 4x8")


def test_what_is_left_out_is_told(training, caplog, tmp_path):
    folder = write_clips(tmp_path / "data", "a-good")
    write_clips(folder, "b-bad", frames=2)
    training(recipe={"steps": 1}, data=folder, broken="skip").run()
    first, *names = caplog.text.splitlines()
    assert first.endswith("3 clips are taken, left out are 3:")
    assert [name.split(":")[0] for name in names] == [f"b-bad.safetensors, clip {row}" for row in range(3)]


def test_clips_are_told_by_what_is_in_them(training, model, tmp_path):
    """Not by their dates or names alone."""
    folder = write_clips(tmp_path / "data", "latents")
    write_video(folder / "video.mp4", (37, 64, 64, 3))
    training(recipe={"steps": 1}, data=folder).run()
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    training(recipe={"steps": 2}, data=folder).run()
    assert len(list((tmp_path / "run/clips").iterdir())) == 1  # encoded once
    write_clips(folder, "latents", seed=1)
    with pytest.raises(TrainingError, match="holds another training"):
        training(recipe={"steps": 3}, data=folder).run()


def test_embeddings_of_captions_stay_on_the_host(model, data):
    trainee = trainee_of(model)
    clips = ClipFolder(data, trainee, 2 * CHUNKS, 16, device="meta")
    assert {each.device.type for each in clips._embeds.values()} == {"cpu"}
    assert clips[0].embeds.device.type == clips[0].latents.device.type == "meta"
    embed = trainee.embed
    trainee.embed = lambda captions: embed(captions).to("meta")
    with pytest.raises(NotImplementedError, match="copy out of meta"):  # what is made elsewhere is brought to the host
        ClipFolder(data, trainee, 2 * CHUNKS, 16)


def test_the_case_of_an_ending_makes_no_difference(model, tmp_path):
    folder = write_clips(tmp_path / "data", "clips")
    (folder / "clips.safetensors").rename(folder / "clips.SAFETENSORS")
    trainee = trainee_of(model)
    assert len(ClipFolder(folder, trainee, 2 * CHUNKS, 16)) == len(CAPTIONS)


def test_other_broken_files(model, tmp_path):
    trainee = trainee_of(model)
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(BrokenClipError, match="holds no usable clip"):
        ClipFolder(folder, trainee, 4, 16)
    (folder / "text.safetensors").write_bytes(b"not a tensor")
    (folder / "text.txt").write_text("a red circle\n")
    (folder / "video.mp4").write_bytes(b"not a video")
    (folder / "video.txt").write_text("a red circle\n")
    nan = torch.full((1, 16, 4, 2, 2), float("nan"))
    save_file({"latents": nan}, folder / "nan.safetensors")
    (folder / "nan.txt").write_text("a red circle\n")
    save_file({"latents": torch.zeros(1, 16, 4, 2, 2)}, folder / "silent.safetensors")
    with pytest.raises(BrokenClipError) as caught:
        ClipFolder(folder, trainee, 4, 16, broken="skip", cache=tmp_path / "cache")
    for part in ("text.safetensors cannot be read", "NaN or infinity", "no captions can be read", "libav decodes"):
        assert part in str(caught.value)
    with pytest.raises(InvalidOptionError, match="no data folder"):
        ClipFolder(tmp_path / "nowhere", trainee, 4, 16)


def test_videos_are_encoded_once(model, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_video(folder / "one.mp4", (20, 48, 80, 3), fps=32)
    trainee, cache = trainee_of(model), tmp_path / "cache"
    clips = ClipFolder(folder, trainee, 3, 16, size=(32, 32), cache=cache)
    assert tuple(clips[0].latents.shape) == (16, 3, 4, 4)  # nine of the ten frames at 16 a second
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    again = ClipFolder(folder, trainee, 3, 16, size=(32, 32), cache=cache)
    assert file.stat().st_mtime_ns == written
    assert torch.equal(again[0].latents, clips[0].latents)
    for nowhere in (None, folder):  # what is encoded would be taken for a clip of its own
        with pytest.raises(InvalidOptionError, match=r"one\.mp4 is a video; give cache, a folder of its own"):
            ClipFolder(folder, trainee, 3, 16, size=(32, 32), cache=nowhere)
    with pytest.raises(BrokenClipError, match="10 frames at 16 frames a second, but 13 are needed"):
        ClipFolder(folder, trainee, 4, 16, size=(32, 32), cache=cache)


def test_options_that_cannot_work(training):
    with pytest.raises(InvalidOptionError, match="lora_rank needs a teacher"):
        training(lora_rank=4)
    with pytest.raises(InvalidOptionError, match="compressor is what is trained"):
        training(options={"compressor": "pool"})
    with pytest.raises(InvalidOptionError, match="mixed_precision must be one of"):
        training(mixed_precision="int8")
    with pytest.raises(InvalidOptionError, match="fps must be a number > 0, got -1"):
        training(fps=-1.0)
    with pytest.raises(InvalidOptionError, match="guidance_scale must be a number, got nan"):
        training(guidance_scale=float("nan"))
    with pytest.raises(InvalidOptionError, match="max_sequence_length must be >= 1, got 0"):
        training(max_sequence_length=0)
    for schedule in ("cosinus", "piecewise_constant"):
        with pytest.raises(InvalidOptionError, match=f"schedule must be one of linear, .*, got '{schedule}'"):
            training(recipe={"schedule": schedule})
    with pytest.raises(InvalidOptionError, match="keep_tokens has no effect: compressor 'dual' does not take it"):
        training(options={**STACK, "keep_tokens": 3}).run()
    with pytest.raises(InvalidOptionError, match="learning_rate must be a number > 0"):
        TrainingRecipe(learning_rate=0.0)


def test_what_cannot_work_is_refused_before_anything_is_loaded(training, monkeypatch):
    monkeypatch.setattr("kvpack.training.compressor.frozen", None)
    with pytest.raises(InvalidOptionError, match="packforcing has commit=last-step; give commit=rerun"):
        training(options={**STACK, "commit": "last-step"}).run()
    with pytest.raises(InvalidOptionError, match="stack packforcing-paper takes no compressor; give one that does"):
        training(stack="packforcing-paper", options={}).run()
    with pytest.raises(InvalidOptionError, match="multiples of 16 and 16 for this model, got 56x64"):
        training(size=(56, 64)).run()
    with pytest.raises(InvalidOptionError, match="no chunk of 2 attends anything that"):
        training(options={**STACK, "sink_frames": 8}).run()


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (UniPCMultistepScheduler(), "UniPCMultistepScheduler has noise levels 157, 1.*, not falling from 1 to 0"),
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler has noise levels 1, "),
        (DDIMScheduler(), "no noise levels from DDIMScheduler: .*sigmas.*; give the model a flow-matching scheduler"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "no noise levels from FlowMatchEuler.*mu"),
    ],
)
def test_a_scheduler_that_is_no_flow_is_refused_before_clips_are_read(scheduler, told, training, model, tmp_path):
    shutil.copytree(model, tmp_path / "other")
    scheduler.save_pretrained(tmp_path / "other/scheduler")
    index = tmp_path / "other/model_index.json"
    kinds = json.loads(index.read_text()) | {"scheduler": ["diffusers", type(scheduler).__name__]}
    index.write_text(json.dumps(kinds))
    with pytest.raises(InvalidOptionError, match=told):
        training(model=tmp_path / "other", data=tmp_path / "nowhere", denoising_steps=4).run()


def test_bf16_model_and_float32_weights(training, tmp_path):
    training(mixed_precision="bf16").run()
    assert all(each.dtype == torch.float32 for each in weights(tmp_path / "run").values())


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_distribution_matching(lora_rank, training, model, tmp_path):
    branch = training(
        teacher=model, lora_rank=lora_rank, critic_steps=2, recipe={"steps": 4, "save_every": 4, "seed": 3}
    ).run()
    assert bool(branch.projection.weight.any()) or lora_rank
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged if row["name"] == "generator loss"] == ["1", "3"]
    assert [row["step"] for row in logged if row["name"] == "critic loss"] == ["1", "2", "3", "4"]
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists() == bool(lora_rank)
    if lora_rank:
        pipe = frozen(model, torch.float32, "cpu")
        before = [each.clone() for each in pipe.transformer.state_dict().values()]
        pipe.load_lora_weights(tmp_path / "run")
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        changed = [not torch.equal(a, b) for a, b in zip(before, pipe.transformer.state_dict().values(), strict=True)]
        assert any(changed)


def test_the_command(model, data, tmp_path):
    given = told(*words(model, data, tmp_path / "run", 1, "--json"))
    assert given["steps"] == 1
    assert given["parameters"] == sum(each.numel() for each in weights(tmp_path / "run").values())
