"""`kvpack_config.json`: enable, generate and plan do what the model was trained for, unless told otherwise."""

import copy
import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import WanPipeline

import kvpack
from helpers import command, told
from kvpack.checkpoints.config import Settings
from kvpack.checkpoints.recipes import RECIPES
from kvpack.errors import InvalidOptionError, UnknownNameError, UnusedOptionError
from kvpack.planning.presets import PRESETS
from kvpack.testing import tiny_wan_pipeline


@pytest.fixture(scope="module")
def longlive(tmp_path_factory):
    """A converted folder."""
    folder = tmp_path_factory.mktemp("folders")
    tiny_wan_pipeline().save_pretrained(folder / "base")
    torch.save({"generator": tiny_wan_pipeline().transformer.state_dict()}, folder / "longlive_base.pt")
    words = ["convert", folder / "longlive_base.pt", "--base", folder / "base", "--output", folder / "out"]
    result = command(*words)
    assert result.exit_code == 0, result.output
    assert "and no --lora was given" in " ".join(result.stdout.replace("│", " ").split())
    return folder / "out"


@pytest.fixture
def folder(longlive, tmp_path):
    """A copy to change."""
    return shutil.copytree(longlive, tmp_path / "model")


@pytest.fixture
def pipe(longlive):
    return WanPipeline.from_pretrained(longlive)


def change(folder, **data):
    path = folder / "kvpack_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **data}))


def test_the_file_says_what_the_recipe_is(longlive):
    data = json.loads((longlive / "kvpack_config.json").read_text())
    assert data == {
        "kvpack_version": kvpack.__version__,
        "recipe": "longlive",
        "stack": {"name": "longlive", "options": RECIPES["longlive"].options},
        "fps": 16.0,
        "first_chunk_frames": None,
        "call": {"num_inference_steps": 4, "guidance_scale": 1.0},
    }
    assert Settings.of_folder(longlive) == RECIPES["longlive"].settings


def test_enabling_without_arguments_is_the_models_own_memory(pipe):
    pipe.enable_packforcing()
    assert pipe.packforcing.stack.to_dict() == {"memory": "longlive", **RECIPES["longlive"].options}
    steps = []
    call = {"num_frames": 33, "height": 32, "width": 32, "output_type": "latent", "max_sequence_length": 8}

    def seen(pipe, step, timestep, tensors):
        steps.append((step, pipe.guidance_scale))
        return tensors

    for each in (pipe, copy.deepcopy(pipe)):
        each("a red circle", callback_on_step_end=seen, **call)
        assert steps == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0)] * 3  # the model's own steps and guidance
        steps.clear()
    pipe("a red circle", guidance_scale=3.0, callback_on_step_end=seen, **call)
    assert steps[0] == (0, 3.0)  # what a call gives goes before it


def test_options_alone_are_those_of_the_models_own_memory(pipe):
    pipe.enable_packforcing(window_frames=9)
    assert (pipe.packforcing.stack.window_frames, pipe.packforcing.stack.sink_frames) == (9, 3)
    with pytest.raises(UnknownNameError, match="no option of stack longlive named 'topk'"):
        pipe.enable_packforcing(topk=3)
    assert pipe.packforcing.stack.window_frames == 9  # as it was


def test_how_the_models_own_archive_is_kept_holds_beside_other_options(folder):
    def enabled(**options):
        stack = WanPipeline.from_pretrained(folder).enable_packforcing(**options).packforcing.stack
        return stack.store.name, stack.tier, stack.eviction

    own = {"topk": 3, "store": "int8", "tier": "host", "eviction": "spread"}
    change(folder, stack={"name": "packforcing", "options": own})
    assert enabled() == enabled(topk=4) == ("int8", "host", "spread")
    assert enabled(store="int4") == ("int4", "host", "spread")
    assert enabled(archive_blocks=None) == ("int8", "host", "oldest")
    with pytest.raises(UnusedOptionError, match="keeps all blocks"):
        enabled(archive_blocks=None, eviction="spread")


def test_another_stack_has_the_lengths_that_the_model_was_trained_with(pipe, folder):
    pipe.enable_packforcing("packforcing", topk=3)
    assert (pipe.packforcing.stack.name, pipe.packforcing.stack.chunk_frames) == ("packforcing", 3)
    assert pipe.packforcing.stack.selector.topk == 3
    assert pipe.enable_packforcing("full", chunk_frames=5).packforcing.stack.chunk_frames == 5  # the user's own first
    change(folder, stack={"name": "packforcing", "options": {"chunk_frames": 3, "topk": 5, "store": "int8"}})
    own = WanPipeline.from_pretrained(folder).enable_packforcing("packforcing", topk=2).packforcing.stack
    assert (own.selector.topk, own.store.name) == (2, "int8")  # of its own stack, by name too, all that it says
    change(folder, stack={"name": "full", "options": {"chunk_frames": 7}})
    pipe = WanPipeline.from_pretrained(folder)
    with pytest.raises(InvalidOptionError, match="window_frames must be at least") as caught:
        pipe.enable_packforcing("infinite-forcing")
    assert caught.value.__notes__ == ["chunk_frames=7 is what the model was made for, unless you say otherwise"]
    with pytest.raises(InvalidOptionError, match="window_frames") as caught:
        pipe.enable_packforcing("infinite-forcing", window_frames=-1)
    assert not hasattr(caught.value, "__notes__")


def test_without_a_file_it_is_packforcing(folder):
    assert tiny_wan_pipeline().enable_packforcing(topk=3).packforcing.stack.name == "packforcing"
    (folder / "kvpack_config.json").unlink()
    (folder / "scheduler/kvpack_config.json").unlink()
    pipe = WanPipeline.from_pretrained(folder).enable_packforcing()
    assert (pipe.packforcing.stack.name, pipe.packforcing.stack.chunk_frames) == ("packforcing", 4)
    shutil.rmtree(folder)
    assert pipe.enable_packforcing().packforcing.stack.name == "packforcing"


def test_what_the_model_is_holds_for_every_stack(folder):
    change(folder, fps=24, first_chunk_frames=1)
    pipe = WanPipeline.from_pretrained(folder)
    for stack in (None, "packforcing"):
        pipe.disable_packforcing()
        pipe.enable_packforcing(stack)
        assert (pipe.packforcing.fps, pipe.packforcing.first_chunk_frames) == (24.0, 1)
    pipe.packforcing.fps = 12
    pipe.packforcing.first_chunk_frames = 2
    again = pipe.enable_packforcing().packforcing
    assert (again.fps, again.first_chunk_frames) == (12.0, 2)  # the user's own stay
    pipe.disable_packforcing()
    change(folder, first_chunk_frames=5)
    with pytest.raises(InvalidOptionError, match="a chunk has 1 to 3 latent frames with this stack, got 5"):
        pipe.enable_packforcing()


@pytest.mark.parametrize(
    "data",
    [
        "{",
        "[]",
        "{}",
        '{"stack": "full"}',
        '{"stack": {"name": 3}}',
        '{"stack": {"name": "full"}, "fps": 0}',
        '{"stack": {"name": "full", "options": []}}',
        '{"stack": {"name": "full"}, "call": []}',
    ],
)
def test_a_broken_file_is_named_and_changes_nothing(data, folder):
    (folder / "kvpack_config.json").write_text(data)
    pipe = WanPipeline.from_pretrained(folder)
    with pytest.raises(InvalidOptionError, match=r"kvpack_config\.json does not hold kvpack's settings"):
        pipe.enable_packforcing()
    assert type(pipe) is WanPipeline
    assert not hasattr(pipe, "packforcing")


def test_from_the_cache_of_the_hub(folder, tmp_path, monkeypatch):
    """As diffusers fetches a repository: components, and no other file of the root."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--me--mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    (folder / "kvpack_config.json").unlink()
    shutil.copytree(folder, repository / "snapshots/abc")
    pipe = WanPipeline.from_pretrained(folder)
    pipe.register_to_config(_name_or_path="me/mine")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert pipe.enable_packforcing().packforcing.stack.name == "longlive"
    pipe.register_to_config(_name_or_path="me/other")
    assert pipe.enable_packforcing().packforcing.stack.name == "packforcing"


def generate(model, output, *more):
    words = ["generate", "--model", model, "--prompt", "a red circle", "--seconds", 1.5, "--output", output, "--json"]
    words += ["--height", 32, "--width", 32, "--call", "max_sequence_length=8", "--device", "cpu", *more]
    return told(*words)


def test_generate_uses_the_models_own_memory_steps_and_fps(folder, tmp_path):
    """Its scheduler refuses any other number of steps than the 4 of the file."""
    change(folder, fps=8)
    done = generate(folder, tmp_path / "video.mp4")
    assert done["stack"] == {"memory": "longlive", **RECIPES["longlive"].options}
    assert (done["fps"], done["frames"]) == (8.0, 9)
    done = generate(folder, tmp_path / "video.mp4", "-o", "sink_frames=0", "--fps", "16")
    assert (done["stack"]["memory"], done["stack"]["sink_frames"]) == ("longlive", 0)
    assert (done["fps"], done["frames"]) == (16.0, 21)
    assert generate(folder, tmp_path / "video.mp4", "--stack", "packforcing")["stack"]["name"] == "packforcing"


plan = partial(told, "plan", "--json")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_preset_of_plan(recipe):
    name = recipe if recipe.endswith(("14b", "5b")) else f"{recipe}-1.3b"
    planned = plan("--preset", name)
    assert planned["stack"] == RECIPES[recipe].stack
    tokens = 390 if name.endswith("5b") else 1560
    assert planned["chunk_tokens"] == tokens * RECIPES[recipe].options["chunk_frames"]
    assert PRESETS[name].configs == PRESETS[RECIPES[recipe].base].configs
    assert plan("--preset", name, "--stack", "full")["stack"] == "full"


def test_plan_reads_the_folder(longlive):
    assert plan("--model", longlive, "--size", "64x64")["stack"] == "longlive"


def test_plan_counts_the_steps_of_the_preset():
    flops = [plan("--preset", f"causal-forcing-framewise-{n}step-1.3b")["flops_per_chunk"] for n in (1, 2)]
    assert 2 * flops[1] == 3 * flops[0]  # a forward a step, and the commit
