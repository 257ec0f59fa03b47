"""Every layout of a LoRA is merged as diffusers loads and fuses it, or refused."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from kvpack.adapters.wan.checkpoint import diffusers_names
from kvpack.checkpoints.lora import merge, read_lora
from kvpack.errors import InvalidOptionError
from kvpack.testing import tiny_wan_pipeline

NAMES = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
OTHERS = {
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
}
ALL = {
    f"blocks.{block}.{name}": f"blocks.{block}.{other}" for block in (0, 1) for name, other in NAMES.items()
} | OTHERS
BLOCKS = [name for name in ALL if name.startswith("blocks")]


@pytest.fixture
def pipeline():
    return tiny_wan_pipeline()


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) / 4


def pairs(pipeline, names, form, sides=("lora_A", "lora_B"), alpha=None, rank=4):
    """Low-rank factors of modules, by the original name of each in a form."""
    tensors = {}
    for name in names:
        out, into = pipeline.transformer.get_parameter(f"{ALL[name]}.weight").shape
        tensors[form(f"{name}.{sides[0]}.weight")] = randn(rank, into)
        tensors[form(f"{name}.{sides[1]}.weight")] = randn(out, rank)
        if alpha is not None:
            tensors[form(f"{name}.alpha")] = torch.tensor(alpha)
    return tensors


def biases(pipeline, names):
    return {
        f"diffusion_model.{name}.diff_b": randn(len(pipeline.transformer.get_parameter(f"{ALL[name]}.bias")))
        for name in names
    }


def comfy(name):
    return f"diffusion_model.{name}"


def kohya(name):
    module, _, rest = name.partition(".lora_")
    if not rest:
        module, rest = name.removesuffix(".alpha"), ""
    return "lora_unet_" + module.replace(".", "_") + (f".lora_{rest}" if rest else ".alpha")


def diffusers(name):
    module = next(each for each in ALL if name.startswith(f"{each}."))
    return f"transformer.{ALL[module]}{name[len(module) :]}"


LAYOUTS = {
    "diffusers": lambda pipe: pairs(pipe, ALL, diffusers),
    "diffusers-before-peft": lambda pipe: pairs(pipe, BLOCKS, diffusers, ("lora.down", "lora.up")),
    "comfy": lambda pipe: pairs(pipe, ALL, comfy),
    "comfy-one-block": lambda pipe: pairs(pipe, BLOCKS[:3], comfy),
    "comfy-up-down-alpha": lambda pipe: pairs(pipe, BLOCKS, comfy, ("lora_down", "lora_up"), alpha=2.0),
    "comfy-alpha-is-an-integer": lambda pipe: pairs(pipe, BLOCKS, comfy, ("lora_down", "lora_up"), alpha=16),
    "comfy-biases": lambda pipe: pairs(pipe, ALL, comfy) | biases(pipe, ALL),
    "comfy-biases-alpha": lambda pipe: pairs(pipe, BLOCKS, comfy, alpha=1.0) | biases(pipe, BLOCKS),
    "comfy-whole-head": lambda pipe: (
        pairs(pipe, BLOCKS, comfy)
        | {"diffusion_model.head.head.diff": randn(*pipe.transformer.proj_out.weight.shape)}
        | biases(pipe, ["head.head"])
    ),
    "comfy-zero-norms": lambda pipe: (
        pairs(pipe, BLOCKS, comfy)
        | {f"diffusion_model.blocks.0.norm3.{kind}": torch.zeros(24) for kind in ("diff", "diff_b")}
    ),
    "kohya": lambda pipe: pairs(pipe, BLOCKS, kohya, ("lora_down", "lora_up"), alpha=2.0),
}


def fused(pipeline, *load, **options):
    """The transformer's weights as diffusers loads and fuses the file."""
    pipeline.load_lora_weights(*load, **options)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline.transformer.state_dict()


def assert_merged_as_fused(pipeline, path):
    weights = {name: each.clone() for name, each in pipeline.transformer.state_dict().items()}
    merged = merge(weights, read_lora(path, None, diffusers_names), None)
    wanted = fused(pipeline, path.parent, weight_name=path.name)
    assert merged.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.allclose(merged[name], weight, rtol=0, atol=2e-5), name
    return sum(not torch.equal(merged[name], weights[name]) for name in weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_merged_as_diffusers_fuses_it(layout, pipeline, tmp_path):
    tensors = LAYOUTS[layout](pipeline)
    save_file({name: each.contiguous() for name, each in tensors.items()}, tmp_path / "lora.safetensors")
    changed = assert_merged_as_fused(pipeline, tmp_path / "lora.safetensors")
    zeros = sum(not each.any() for each in tensors.values())
    assert changed == sum(name.endswith(("lora_A.weight", "down.weight", "diff", "diff_b")) for name in tensors) - zeros


CONFIGS = {
    "alpha": {"lora_alpha": 16},
    "alpha-below-the-rank": {"lora_alpha": 1},
    "rank-stabilised": {"lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "lora_alpha": 6,
        "alpha_pattern": {"attn1.to_q": 3, r"blocks\.1\.attn2\.to_k": 12, "ffn.net.2": 2},
        "rank_pattern": {"attn1.to_q": 2, "ffn.net.0.proj": 8},
    },
    "rank-stabilised-patterns": {
        "lora_alpha": 6,
        "use_rslora": True,
        "alpha_pattern": {"to_q": 3},
        "rank_pattern": {"to_q": 2},
    },
    "biases": {"lora_alpha": 16, "lora_bias": True},
}


def saved(pipeline, folder, config):
    """A LoRA as `save_lora_weights` of diffusers writes it, and its config."""
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    transformer = pipeline.transformer
    transformer.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **config))
    torch.manual_seed(0)
    for name, each in transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(each, std=0.25)
    pipeline.save_lora_weights(
        folder,
        get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("config", CONFIGS)
def test_the_strength_in_the_header_of_what_diffusers_saves(config, pipeline, tmp_path):
    path = saved(tiny_wan_pipeline(), tmp_path, CONFIGS[config])
    assert assert_merged_as_fused(pipeline, path) == (40 if "lora_bias" in CONFIGS[config] else 20)
    plain = merge(tiny_wan_pipeline().transformer.state_dict(), read_lora(path, 4.0, diffusers_names), None)
    name = "blocks.0.attn1.to_k.weight"
    assert not torch.allclose(plain[name], pipeline.transformer.state_dict()[name], atol=1e-3) or config == "patterns"


def test_what_the_adapter_of_a_model_saves_without_the_pipeline(pipeline, tmp_path):
    other = tiny_wan_pipeline()
    saved(other, tmp_path, {"lora_alpha": 16})
    other.transformer.save_lora_adapter(tmp_path, weight_name="adapter.safetensors")
    both = [
        read_lora(tmp_path / name, None, diffusers_names)
        for name in ("adapter.safetensors", "pytorch_lora_weights.safetensors")
    ]
    assert {name: each.scale for name, each in both[0].items()} == dict.fromkeys(both[1], 4.0)


def test_a_folder_of_peft_says_its_strength_in_its_config(pipeline, tmp_path):
    transformer = tiny_wan_pipeline().transformer
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, alpha_pattern={"to_q": 2}, target_modules=["to_q", "to_k"])
    transformer.add_adapter(config)
    tensors = get_peft_model_state_dict(transformer)
    save_file(
        {f"base_model.model.{name}": each for name, each in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    config.save_pretrained(tmp_path)
    found = read_lora(tmp_path, None, diffusers_names)
    assert {found[f"blocks.0.attn1.{name}.weight"].scale for name in ("to_q",)} == {2 / 4**0.5}
    assert {found[f"blocks.0.attn1.{name}.weight"].scale for name in ("to_k",)} == {6 / 4**0.5}


def test_what_diffusers_drops_of_differences_is_merged(pipeline, tmp_path):
    """Of a modulation and of a norm, diffusers says in its log that it does not handle them."""
    weights = pipeline.transformer.state_dict()
    tensors = {
        "diffusion_model.blocks.0.diff_m": randn(1, 6, 24),
        "diffusion_model.head.diff_m": randn(1, 2, 24),
        "diffusion_model.blocks.1.norm3.diff": randn(24),
        "diffusion_model.patch_embedding.diff": randn(*weights["patch_embedding.weight"].shape),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    merged = merge(weights, read_lora(tmp_path / "lora.safetensors", None, diffusers_names), None)
    names = ("blocks.0.scale_shift_table", "scale_shift_table", "blocks.1.norm2.weight", "patch_embedding.weight")
    for name, tensor in zip(names, tensors.values(), strict=True):
        assert torch.allclose(merged[name] - weights[name], tensor, atol=1e-6), name
    assert sum(not torch.equal(merged[name], weights[name]) for name in weights) == 4


def test_a_convolution(pipeline, tmp_path):
    torch.manual_seed(0)
    other = tiny_wan_pipeline()
    other.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=6, target_modules=["patch_embedding"], init_lora_weights=False)
    )
    other.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(other.transformer),
        transformer_lora_adapter_metadata=other.transformer.peft_config["default"].to_dict(),
    )
    assert assert_merged_as_fused(pipeline, tmp_path / "pytorch_lora_weights.safetensors") == 1


def written(pipeline, tmp_path, metadata, **options):
    tensors = pairs(pipeline, BLOCKS, diffusers, **options)
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"format": "pt", **metadata})
    return tmp_path / "lora.safetensors"


def peft(**config):
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in config.items()})}


REFUSED = {
    "dora": (peft(r=4, lora_alpha=8, use_dora=True), {}, "asks for use_dora, which is not merged"),
    "pissa": (peft(r=4, lora_alpha=8, init_lora_weights="pissa"), {}, "asks for init_lora_weights pissa"),
    "lokr": (peft(r=4, lora_alpha=8, peft_type="LOKR"), {}, "asks for peft_type LOKR"),
    "no-json": ({"lora_adapter_metadata": "{"}, {}, "lora_adapter_metadata of .* is not PEFT's"),
    "no-alpha": (peft(r=4), {}, "it has no lora_alpha"),
    "another-rank": (peft(r=8, lora_alpha=8), {}, "has rank 4, but its config says 8"),
    "two-places": (peft(r=4, lora_alpha=8), {"alpha": 2.0}, "alpha and lora_adapter_metadata in its header"),
    "a-note": ({"ss_network_alpha": "16"}, {}, "notes alpha 16 beside rank 4"),
    "a-note-in-words": ({"ss_network_alpha": "much"}, {}, "notes alpha as 'much'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_strength_that_is_not_known_for_sure_is_refused(case, pipeline, tmp_path):
    metadata, options, message = REFUSED[case]
    path = written(pipeline, tmp_path, metadata, **options)
    with pytest.raises(InvalidOptionError, match=message):
        read_lora(path, None, diffusers_names)


def test_a_note_of_alpha_beside_alphas_and_one_that_says_the_rank(pipeline, tmp_path):
    path = written(pipeline, tmp_path, {"ss_network_alpha": "2.0"}, alpha=2.0)
    assert {each.scale for each in read_lora(path, None, diffusers_names).values()} == {0.5}
    path = written(pipeline, tmp_path, {"ss_network_alpha": "4"})
    assert {each.scale for each in read_lora(path, None, diffusers_names).values()} == {1.0}


def test_the_alpha_that_is_asked_for_goes_before_all(pipeline, tmp_path):
    path = written(pipeline, tmp_path, peft(r=4, lora_alpha=8, alpha_pattern={"to_q": 1}), alpha=2.0)
    assert {each.scale for each in read_lora(path, 12.0, diffusers_names).values()} == {3.0}


def test_two_configs_that_differ(pipeline, tmp_path):
    path = written(pipeline, tmp_path, peft(r=4, lora_alpha=8))
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    assert {each.scale for each in read_lora(path, None, diffusers_names).values()} == {2.0}
    config.write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    with pytest.raises(InvalidOptionError, match="differ in the LoRA's strength"):
        read_lora(path, None, diffusers_names)


def test_a_file_of_another_method(pipeline, tmp_path):
    for key in ("blocks.0.self_attn.q.lokr_w1", "blocks.0.self_attn.q.dora_scale", "blocks.0.ffn.0.hada_w1_a"):
        save_file({f"diffusion_model.{key}": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
        with pytest.raises(InvalidOptionError, match=f"{re.escape(key)}, which is no LoRA's"):
            read_lora(tmp_path / "lora.safetensors", None, diffusers_names)


def test_what_is_saved_here_is_read_here(pipeline, tmp_path):
    """The file is what diffusers wrote: names with a prefix, the config as JSON in the header."""
    path = saved(tiny_wan_pipeline(), tmp_path, {"lora_alpha": 16})
    assert all(name.startswith("transformer.") for name in load_file(path))
    assert {each.scale for each in read_lora(path, None, diffusers_names).values()} == {4.0}
