"""The nodes for ComfyUI, loaded and called as ComfyUI does it; the modules of ComfyUI are stand-ins."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvpack.errors import UnknownNameError

FOLDER = Path(__file__).parent.parent / "examples/comfyui"


class Interrupted(Exception):
    """What ComfyUI raises where somebody pressed Cancel."""


@pytest.fixture
def comfy(monkeypatch, model):
    """What the nodes use of ComfyUI; `moved` are the totals and steps of its bar."""
    moved = []

    class ProgressBar:
        def __init__(self, total):
            moved.append(total)

        def update(self, steps):
            moved.append(steps)

    folder_paths, utils, management = (ModuleType(name) for name in ("folder_paths", "comfy.utils", "management"))
    folder_paths.get_folder_paths = lambda kind: [str(model.parent)] if kind == "diffusers" else []
    utils.ProgressBar, management.get_torch_device = ProgressBar, lambda: torch.device("cpu")
    management.throw_exception_if_processing_interrupted = lambda: None
    package = ModuleType("comfy")
    package.utils, package.model_management, package.moved = utils, management, moved
    found = {"comfy": package, "comfy.utils": utils, "comfy.model_management": management, "folder_paths": folder_paths}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return package


@pytest.fixture
def nodes(comfy, monkeypatch):
    """The package, loaded as ComfyUI loads a folder of `custom_nodes`."""
    spec = importlib.util.spec_from_file_location("custom_nodes_kvpack", FOLDER / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_nodes_kvpack", package)
    spec.loader.exec_module(package)
    return package.NODE_CLASS_MAPPINGS


def run(nodes, graph):
    """Outputs of each node of a graph, as far as its class is ours; inputs are checked as ComfyUI does."""
    done = {}
    for name, node in graph.items():
        if node["class_type"] not in nodes:
            continue
        cls = nodes[node["class_type"]]
        kinds = cls.INPUT_TYPES()
        given = {}
        for key, value in node["inputs"].items():
            kind = {**kinds["required"], **kinds.get("optional", {})}[key][0]
            if isinstance(value, list):
                source, index = value
                assert nodes[graph[source]["class_type"]].RETURN_TYPES[index] == kind
                value = done[source][index]
            elif isinstance(kind, list):
                assert value in kind
            given[key] = value
        assert set(kinds["required"]) <= set(given)
        done[name] = getattr(cls(), cls.FUNCTION)(**given)
        assert len(done[name]) == len(cls.RETURN_TYPES) == len(cls.RETURN_NAMES)
    return done


@pytest.fixture
def graph():
    return json.loads((FOLDER / "workflow_api.json").read_text())


def test_the_workflow_makes_frames_and_another_prompt_changes_them(nodes, comfy, graph):
    frames, fps = run(nodes, graph)["4"]
    assert frames.shape == (61, 64, 64, 3)
    assert (frames.dtype, fps) == (torch.float32, 16.0)
    assert 0 <= frames.min() < frames.max() <= 1
    assert comfy.moved == [4, 1, 1, 1, 1]
    graph["3"]["inputs"]["schedule"] = "a red circle bouncing over dusk rings"
    alone = run(nodes, graph)["4"][0]
    assert torch.equal(alone[:29], frames[:29])
    assert not torch.equal(alone[45:], frames[45:])


def test_latents_are_those_that_the_vae_takes(nodes, graph):
    from diffusers import AutoencoderKLWan

    from kvpack.shipped import shipped_folder

    graph["4"]["inputs"]["seconds"] = 1.0
    frames = run(nodes, graph)["4"][0]
    graph["4"]["class_type"] = "KVPackLatents"
    (latents,) = run(nodes, graph)["4"]
    assert latents["samples"].shape == (1, 16, 4, 4, 4)
    vae = AutoencoderKLWan.from_pretrained(shipped_folder(), subfolder="vae")
    with torch.no_grad():
        decoded = vae.decode(latents["samples"]).sample[0].movedim(0, -1).add(1).div(2).clamp(0, 1)
    torch.testing.assert_close(decoded, frames, atol=1e-4, rtol=0)


def test_a_folder_of_comfyui_and_a_path_are_loaded(nodes, model):
    choices = nodes["KVPackLoadPipeline"].INPUT_TYPES()["required"]["folder"][0]
    assert choices[1:] == [model.name]
    load = nodes["KVPackLoadPipeline"]().load
    for given in ({"folder": model.name}, {"folder": choices[0], "path": str(model)}):
        (pipeline,) = load(dtype="float32", **given)
        assert Path(pipeline.name_or_path) == model


def test_schedules_and_memories_are_read(nodes):
    read, choose = nodes["KVPackPrompts"]().read, nodes["KVPackMemory"]().choose
    assert read(" a fox \n") == ("a fox",)
    assert read("0: a fox\n\n2.5 cut: a bear: it eats") == ([(0.0, "a fox"), (2.5, "a bear: it eats", "cut")],)
    with pytest.raises(ValueError, match="must begin with a second"):
        read("0: a fox\na bear")
    assert choose("packforcing", "topk=4, store=int8") == (("packforcing", {"topk": 4, "store": "int8"}),)
    assert choose("(the model's own)", "") == ((None, {}),)


def test_cancel_ends_the_video_and_frees_the_pipeline(nodes, comfy, graph):
    def cancel():
        raise Interrupted

    comfy.model_management.throw_exception_if_processing_interrupted = cancel
    with pytest.raises(Interrupted):
        run(nodes, graph)
    assert comfy.moved == [4, 1]
    comfy.model_management.throw_exception_if_processing_interrupted = lambda: None
    graph["2"]["inputs"]["options"] = ""
    graph["4"]["inputs"]["seconds"] = 1.0
    assert len(run(nodes, graph)["4"][0]) == 13
    with pytest.raises(UnknownNameError):
        nodes["KVPackFrames"]().generate(
            nodes["KVPackLoadPipeline"]().load("(the tiny model that comes with kvpack)", "float32")[0],
            memory=("nothing", {}),
            prompts="a",
            seconds=1.0,
            seed=0,
        )
