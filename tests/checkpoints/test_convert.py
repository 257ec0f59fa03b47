"""`kvpack convert`: every layout of a checkpoint gives the same tensors, and the golden weights their golden video."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.schedulers import scheduling_flow_match_lcm
from safetensors.torch import load_file, save_file

import kvpack
from helpers import told
from kvpack.checkpoints.card import model_card
from kvpack.checkpoints.reading import read_checkpoint
from kvpack.checkpoints.recipes import RECIPES, recipe_for
from kvpack.testing import tiny_wan_pipeline

DATA = Path(__file__).parents[1] / "golden_data"
#: The names of the original code, from diffusers' names.
ORIGINAL = (
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"scale_shift_table", "modulation"),
    (r"attn1", "self_attn"),
    (r"attn2", "cross_attn"),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    (r"\.norm2\.", ".norm3."),  # the norm in front of cross attention
)


def original(weights):
    """Weights under the names of the original code."""
    named = {}
    for name, tensor in weights.items():
        for pattern, replacement in ORIGINAL:
            name = re.sub(pattern, replacement, name)
        named[name] = tensor
    return named


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def wrapped(weights):
    """As FSDP of every block, and of the whole, names them."""
    inner = {re.sub(r"^(blocks\.\d+)\.", r"\1._fsdp_wrapped_module.", name): each for name, each in weights.items()}
    return prefixed(inner, "_fsdp_wrapped_module.")


def wrong(weights):
    """Other weights of the same names, which must not be taken."""
    return {name: torch.zeros_like(tensor) for name, tensor in weights.items()}


LAYOUTS = {
    "flat": lambda w: w,
    "generator": lambda w: {"generator": w, "critic": wrong(w), "step": 3000},
    "generator-ema": lambda w: {"generator": wrong(w), "generator_ema": w, "critic": {"x": torch.zeros(1)}},
    "model": lambda w: {"model": w},
    "state-dict": lambda w: {"state_dict": w, "epoch": 1},
    "nested": lambda w: {"generator_ema": {"state_dict": {"model": w}}},
    "prefix-model": lambda w: prefixed(w, "model."),
    "prefix-comfy": lambda w: prefixed(w, "model.diffusion_model."),
    "prefix-fsdp": wrapped,
    "prefix-compiled": lambda w: prefixed(w, "_orig_mod."),
    "prefix-ddp": lambda w: prefixed(w, "module."),
    "compiled-blocks": lambda w: {re.sub(r"^(blocks\.\d+)\.", r"\1._orig_mod.", name): t for name, t in w.items()},
    "combined": lambda w: {
        "generator": wrong(w),
        "generator_ema": prefixed(wrapped(prefixed(w, "_orig_mod.")), "module.model."),
    },
    "diffusers": lambda w: convert_wan_transformer_to_diffusers(dict(w)),
    "diffusers-nested": lambda w: {"generator": prefixed(convert_wan_transformer_to_diffusers(dict(w)), "model.")},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A whole pipeline; its transformer has the golden config and other weights."""
    folder = tmp_path_factory.mktemp("base")
    tiny_wan_pipeline().save_pretrained(folder)
    (folder / "transformer/config.json").write_text((DATA / "transformer_config.json").read_text())
    return folder


@pytest.fixture(scope="module")
def weights():
    return original(load_file(DATA / "weights.safetensors"))


def convert(source, base, output, *more):
    words = ["convert", source, "--base", base, "--output", output, "--recipe", "self-forcing", "--json", *more]
    return told(*words)


def converted(output):
    tensors = {}
    for path in (output / "transformer").glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def assert_equal(given, wanted):
    assert given.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert given[name].dtype == tensor.dtype
        assert torch.equal(given[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_directly_converted_tensors(layout, weights, base, tmp_path):
    torch.save(LAYOUTS[layout](weights), tmp_path / "model.pt")
    done = convert(tmp_path / "model.pt", base, tmp_path / "out")
    assert_equal(converted(tmp_path / "out"), convert_wan_transformer_to_diffusers(dict(weights)))
    assert done["tensors"] == len(weights)


def flattened(data, prefix=""):
    """What safetensors can say of a nested dict."""
    flat = {}
    for key, value in data.items():
        inner = flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        flat |= {name: each.clone() for name, each in inner.items() if isinstance(each, torch.Tensor)}
    return flat


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each != "nested"])
def test_every_layout_in_safetensors(layout, weights, tmp_path):
    save_file(flattened(LAYOUTS[layout](weights)), tmp_path / "model.safetensors")
    names = read_checkpoint(tmp_path / "model.safetensors").tensors
    plain = convert_wan_transformer_to_diffusers(dict(weights)) if layout.startswith("diffusers") else weights
    assert_equal(names, plain)


@pytest.mark.parametrize("index", [True, False], ids=["index", "several-files"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_folder_of_shards(index, suffix, weights, base, tmp_path):
    folder, names = tmp_path / "shards", list(weights)
    folder.mkdir()
    parts = {f"part-{i}{suffix}": {name: weights[name] for name in names[i::3]} for i in range(3)}
    for file, part in parts.items():
        (save_file if suffix == ".safetensors" else torch.save)(part, folder / file)
    if index:
        places = {name: file for file, part in parts.items() for name in part}
        (folder / f"model{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
        save_file({"left.over": torch.zeros(1)}, folder / "other.safetensors")
    convert(folder, base, tmp_path / "out")
    assert_equal(converted(tmp_path / "out"), convert_wan_transformer_to_diffusers(dict(weights)))


def test_other_weights_can_be_asked_for(weights, base, tmp_path):
    torch.save({"generator_ema": wrong(weights), "ema_2": {"model": weights}}, tmp_path / "model.pt")
    done = convert(tmp_path / "model.pt", base, tmp_path / "out", "--weights", "ema_2")
    assert done["nesting"] == ["ema_2", "model"]
    assert_equal(converted(tmp_path / "out"), convert_wan_transformer_to_diffusers(dict(weights)))


def test_a_recipe_prefers_what_its_own_code_loads(weights, base, tmp_path):
    torch.save({"generator_ema": wrong(weights), "generator": weights}, tmp_path / "model.pt")
    done = convert(tmp_path / "model.pt", base, tmp_path / "out", "--recipe", "causal-forcing-chunkwise")
    assert done["nesting"] == ["generator"]
    assert_equal(converted(tmp_path / "out"), convert_wan_transformer_to_diffusers(dict(weights)))


def test_dtype_and_shard_size(weights, base, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", base, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "200KB")
    assert len(list((tmp_path / "out/transformer").glob("*.safetensors"))) > 3
    wanted = convert_wan_transformer_to_diffusers({name: each.bfloat16() for name, each in weights.items()})
    assert_equal(converted(tmp_path / "out"), wanted)


def test_the_other_parts_are_the_bases(weights, base, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    done = convert(tmp_path / "model.safetensors", base, tmp_path / "out")
    assert sorted(done["copied"]) == ["text_encoder", "tokenizer", "vae"]
    for part in done["copied"]:
        for path in (base / part).rglob("*"):
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(base)).read_bytes()
    pipe = WanPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipe.scheduler, kvpack.FlowMatchFewStepScheduler)
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625])


def test_a_base_of_the_config_alone(weights, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text((DATA / "transformer_config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors")
    done = convert(tmp_path / "model.safetensors", tmp_path / "base", tmp_path / "out")
    assert (done["copied"], sorted(done["absent"])) == ([], ["text_encoder", "tokenizer", "vae"])
    parts = {name: getattr(tiny_wan_pipeline(), name) for name in done["absent"]}
    pipe = WanPipeline.from_pretrained(tmp_path / "out", **parts)
    assert_equal(pipe.transformer.state_dict(), convert_wan_transformer_to_diffusers(dict(weights)))


def test_the_golden_video_from_the_original_weights(weights, base, tmp_path, monkeypatch, record_property):
    """As test_golden.py, the whole way: weights, scheduler and pipeline come from the converted folder."""
    torch.save({"generator_ema": wrapped(prefixed(weights, "model."))}, tmp_path / "self_forcing_dmd.pt")
    convert(tmp_path / "self_forcing_dmd.pt", base, tmp_path / "out")
    golden = load_file(DATA / "rollouts.safetensors")
    noises = iter([eps for chunk in golden["renoise"].float() for eps in (*chunk, torch.zeros_like(chunk[0]))])
    monkeypatch.setattr(
        scheduling_flow_match_lcm,
        "randn_tensor",
        lambda shape, **_: next(noises).movedim(0, 1)[None].expand(shape),
    )
    pipe = WanPipeline.from_pretrained(tmp_path / "out")
    pipe.register_modules(transformer=WanTransformer3DModel.from_pretrained(tmp_path / "out/transformer").eval())
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_packforcing("full", chunk_frames=3)
    stream = pipe.packforcing.stream(
        prompt_embeds=golden["prompt_embeds"],
        latents=golden["noise"][:, :21].float().transpose(1, 2),
        num_inference_steps=4,
        guidance_scale=1.0,
        output_type="latent",
    )
    chunks = list(zip(stream, golden["full.latents"].split(3, dim=1), strict=True))
    errors = [float((given.transpose(1, 2) - wanted).norm() / wanted.norm()) for given, wanted in chunks]
    largest = max(float((given.transpose(1, 2) - wanted).abs().max()) for given, wanted in chunks)
    record_property("latents_rel_l2", max(errors))
    assert len(chunks) == 7
    assert max(errors) <= 2e-5
    assert largest <= 1e-4


def test_the_card_says_what_it_was_made_of(base, weights, tmp_path, monkeypatch):
    save_file(weights, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", base, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["library_name"], head["pipeline_tag"]) == ("diffusers", "text-to-video")
    assert "base_model" not in head  # a folder's name is no model's
    assert str(tmp_path) not in card
    assert "`model.safetensors`, recipe `self-forcing`" in card
    assert "num_inference_steps=4, guidance_scale=1.0; 16 frames a second" in card
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(block.replace("num_frames=957", "num_frames=9, height=32, width=32"), names)
    assert names["pipe"].packforcing.stack.chunk_frames == 3
    assert len(names["video"]) == 9


def test_the_card_names_the_base_of_the_hub():
    card = model_card(RECIPES["longlive"], Path("a/base.pt"), Path("Wan-AI/Wan2.1"), Path("a/lora.pt"), "longlive")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "Wan-AI/Wan2.1"
    assert "| LoRA, merged | `lora.pt` |" in card
    assert "Note: trained in chunks of 3" in card


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_enables_without_arguments(name, base, weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", base, tmp_path / "out", "--recipe", name)
    pipe = WanPipeline.from_pretrained(tmp_path / "out").enable_packforcing()
    recipe = RECIPES[name]
    assert pipe.packforcing.stack.name == recipe.stack
    assert pipe.packforcing.stack.chunk_frames == recipe.options["chunk_frames"]
    pipe.scheduler.set_timesteps(recipe.settings.call["num_inference_steps"])
    wanted = [1000 * recipe.shift * s / (1 + (recipe.shift - 1) * s) for s in recipe.sigmas]
    assert pipe.scheduler.timesteps.tolist() == pytest.approx(wanted, abs=2 if recipe.solver else 1e-3)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("checkpoints/self_forcing_dmd.pt", "self-forcing"),
        ("Causal-Forcing/chunkwise/causal_forcing.pt", "causal-forcing-chunkwise"),
        ("checkpoints/framewise/causal_forcing.pt", "causal-forcing-framewise"),
        ("checkpoints/framewise-2step/causal_forcing.pt", "causal-forcing-framewise-2step"),
        ("CausVid/autoregressive_checkpoint/model.pt", "causvid"),
        ("CausVid/autoregressive_checkpoint_warp_4step_cfg2/model.pt", "causvid-4step"),
        ("longlive_models/models/longlive_base.pt", "longlive"),
        ("Infinite-Forcing/model.pt", "infinite-forcing"),
        ("checkpoints/krea-realtime-video-14b.safetensors", "krea-14b"),
    ],
)
def test_the_path_tells_the_recipe(path, name, tmp_path):
    assert recipe_for(tmp_path / path, None).name == name


def test_the_documents_name_every_recipe():
    text = (Path(__file__).parents[2] / "docs/convert.md").read_text()
    for name in RECIPES:
        assert f"`{name}`" in text or f"`-{name.rpartition('-')[2]}`" in text, name
