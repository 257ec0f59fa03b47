"""LoRA deltas are merged exactly: the float64 sum, rounded once."""

import json
from fractions import Fraction

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file

from helpers import command
from kvpack.checkpoints.lora import Delta, merge, read_lora, rounded
from kvpack.errors import InvalidOptionError
from kvpack.testing.pipelines import tiny_wan_transformer

MODULES = ("self_attn.q", "self_attn.o", "cross_attn.v", "ffn.0", "ffn.2")
DIFFUSERS = {
    "self_attn.q": "attn1.to_q",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.v": "attn2.to_v",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


@pytest.fixture(scope="module")
def transformer():
    return tiny_wan_transformer().to(torch.bfloat16)


@pytest.fixture(scope="module")
def pairs(transformer):
    """Both factors for five modules of each block, by original name."""
    torch.manual_seed(0)
    found = {}
    for block in range(2):
        for rank, module in enumerate(MODULES, start=3):
            out, into = transformer.get_parameter(f"blocks.{block}.{DIFFUSERS[module]}.weight").shape
            found[f"blocks.{block}.{module}"] = (torch.randn(rank, into), torch.randn(out, rank))
    return found


def peft_keys(pairs, form="base_model.model.{}.lora_{}.weight"):
    return {
        form.format(name, side): each for name, pair in pairs.items() for side, each in zip("AB", pair, strict=True)
    }


def nearest_bfloat16(number):
    """By exact arithmetic; ties go to the even one."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = bits[bits.isfinite()].double().unique()
    place = int(torch.searchsorted(values, torch.tensor(float(number), dtype=torch.float64)))
    near = [values[i] for i in (place - 1, place) if 0 <= i < len(values)]
    distance = {each: abs(Fraction(float(each)) - number) for each in near}
    best = [each for each in near if distance[each] == min(distance.values())]
    return next(each for each in best if len(best) == 1 or int(each.bfloat16().view(torch.int16)) % 2 == 0).bfloat16()


def test_the_sum_is_rounded_once():
    """Float32 first would round these to a tie and lose what decides it."""
    tie = 1 + 2.0**-8
    exact = torch.tensor([tie, tie + 2.0**-40, tie - 2.0**-40, -tie - 2.0**-40, 0.0, 1e-41, 3.0], dtype=torch.float64)
    given = rounded(exact, torch.bfloat16)
    assert given.tolist() == [float(nearest_bfloat16(Fraction(float(each)))) for each in exact]
    assert given[1] != exact[1].to(torch.bfloat16)  # what torch does
    half = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)
    assert rounded(half, torch.float16).item() == 1 + 2.0**-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merged_bit_for_bit_as_exact_arithmetic(dtype):
    torch.manual_seed(1)
    # Few bits, so that float64 holds products and sums without rounding.
    weight, down, up = (torch.randint(-64, 64, shape) / 32 for shape in ((6, 5), (4, 5), (6, 4)))
    merged = Delta({"down": down.to(dtype), "up": up.to(dtype)}, scale=3 / 4).merged(weight.to(dtype), dtype)
    for row in range(6):
        for column in range(5):
            product = sum(Fraction(float(up[row, i])) * Fraction(float(down[i, column])) for i in range(4))
            exact = Fraction(float(weight[row, column])) + Fraction(3, 4) * product
            if dtype == torch.bfloat16:
                assert merged[row, column] == nearest_bfloat16(exact)
            else:
                assert float(merged[row, column]) == float(torch.tensor(float(exact)).to(dtype))


FORMS = {
    "peft": lambda pairs: peft_keys(pairs),
    "peft-default": lambda pairs: peft_keys(pairs, "base_model.model.{}.lora_{}.default.weight"),
    "fsdp": lambda pairs: peft_keys(pairs, "model._fsdp_wrapped_module.{}.lora_{}.weight"),
    "generator-lora": lambda pairs: {
        "generator_lora": peft_keys(pairs),
        "critic_lora": {"blocks.0.nothing.lora_A.weight": torch.zeros(1, 1)},
    },
    "lora-up-down": lambda pairs: {
        f"diffusion_model.{name}.lora_{side}.weight": each
        for name, pair in pairs.items()
        for side, each in zip(("down", "up"), pair, strict=True)
    },
    "diffusers": lambda pairs: peft_keys(
        {name[:9] + DIFFUSERS[name[9:]]: pair for name, pair in pairs.items()}, "transformer.{}.lora_{}.weight"
    ),
}


def convert(transformer, tmp_path, *more):
    transformer.save_config(tmp_path / "base")
    save_file(transformer.state_dict(), tmp_path / "longlive_base.safetensors")
    words = ["convert", tmp_path / "longlive_base.safetensors", "--base", tmp_path / "base", "--json", *more]
    words += ["--output", tmp_path / "out", "--recipe", "longlive", "--lora", tmp_path / "lora.pt"]
    return command(*words)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_merged_in_float64(form, transformer, pairs, tmp_path):
    torch.save(FORMS[form](pairs), tmp_path / "lora.pt")
    result = convert(transformer, tmp_path, "--lora-alpha", 8)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["merged"] == len(pairs)
    given = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    deltas = {
        f"{name[:9]}{DIFFUSERS[name[9:]]}.weight": 8 / len(down) * (up.double() @ down.double())
        for name, (down, up) in pairs.items()
    }
    for name, weight in transformer.state_dict().items():
        wanted = rounded(weight.double() + deltas[name], weight.dtype) if name in deltas else weight
        assert torch.equal(given[name], wanted), name
        assert (name in deltas) != torch.equal(given[name], weight)


def test_as_peft_merges():
    """In float32, PEFT's own order of rounding is within a few units of the last place."""
    import peft

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(24, 16))
    weight = layer[0].weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    wrapped = peft.get_peft_model(layer, config)
    tensors = peft.get_peft_model_state_dict(wrapped)
    factors = {"down": tensors["base_model.model.0.lora_A.weight"], "up": tensors["base_model.model.0.lora_B.weight"]}
    delta = Delta(factors, scale=6 / 4)
    merged = wrapped.merge_and_unload()[0].weight.detach()
    assert torch.allclose(delta.merged(weight, torch.float32), merged, rtol=0, atol=2e-6)
    assert not torch.allclose(weight, merged, atol=1e-2)


def read(path, alpha=None):
    return read_lora(path, alpha, convert_wan_transformer_to_diffusers)


def test_alpha_is_the_callers_then_the_files_then_the_rank(pairs, tmp_path):
    tensors = peft_keys(pairs) | {"blocks.0.ffn.0.alpha": torch.tensor(5.0)}
    torch.save(tensors, tmp_path / "lora.pt")
    name, other = "blocks.0.ffn.net.0.proj.weight", "blocks.0.ffn.net.2.weight"
    rank, other_rank = (len(pairs[f"blocks.0.{module}"][0]) for module in ("ffn.0", "ffn.2"))
    assert (read(tmp_path / "lora.pt")[name].scale, read(tmp_path / "lora.pt")[other].scale) == (5 / rank, 1)
    assert read(tmp_path / "lora.pt", 2.0)[name].scale == 2 / rank
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16}))
    both = read(tmp_path / "lora.pt")
    assert (both[name].scale, both[other].scale) == (5 / rank, 16 / other_rank)
    up, down = torch.ones(2, 1), torch.ones(1, 2)
    assert Delta({"up": up, "down": down}).merged(torch.zeros(2, 2), torch.float32).tolist() == [[1, 1], [1, 1]]


def test_one_rounding_into_another_dtype(transformer, pairs, tmp_path):
    torch.save(peft_keys(pairs), tmp_path / "lora.pt")
    assert convert(transformer, tmp_path, "--dtype", "float32").exit_code == 0
    given = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    name, (down, up) = "blocks.1.attn1.to_q.weight", pairs["blocks.1.self_attn.q"]
    exact = transformer.get_parameter(name).double() + up.double() @ down.double()
    assert torch.equal(given[name], exact.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.ffn.0.magnitude": torch.ones(1)}, "blocks.0.ffn.0.magnitude, which is no LoRA's"),
        ({"blocks.0.ffn.4.lora_A.weight": torch.ones(1, 1)}, "half of a LoRA pair for blocks.0.ffn.4: down"),
        ({"blocks.0.ffn.0.lora_A.b.weight": torch.ones(3, 3)}, "two adapters for blocks.0.ffn.0"),
        (
            {"blocks.0.ffn.0.lora_A.weight": torch.ones(3, 3, 1)},
            r"must be \[rank, in\] and \[out, rank\], got \[3, 3, 1\]",
        ),
    ],
)
def test_what_is_no_lora(change, message, pairs, tmp_path):
    torch.save(peft_keys(pairs, "{}.lora_{}.weight") | change, tmp_path / "lora.pt")
    with pytest.raises(InvalidOptionError, match=message):
        read(tmp_path / "lora.pt")


def test_a_peft_config_that_means_something_else(pairs, tmp_path):
    torch.save(peft_keys(pairs), tmp_path / "lora.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "use_dora": True}))
    with pytest.raises(InvalidOptionError, match="asks for use_dora, which is not merged"):
        read(tmp_path / "lora.pt")


def test_a_lora_of_another_model(transformer, pairs, tmp_path):
    torch.save(peft_keys({"blocks.7.ffn.0": pairs["blocks.0.ffn.0"]}), tmp_path / "lora.pt")
    with pytest.raises(InvalidOptionError, match=r"1 of 1 LoRA deltas belong to no weight .* blocks.7.ffn.net.0.proj"):
        merge(transformer.state_dict(), read(tmp_path / "lora.pt"), None)
    torch.save(peft_keys({"blocks.0.ffn.0": pairs["blocks.0.ffn.2"]}), tmp_path / "lora.pt")
    result = convert(transformer, tmp_path)
    assert result.exit_code == 1
    assert "the LoRA delta of blocks.0.ffn.net.0.proj.weight is (24, 32), but the weight is (32, 24)" in result.stderr
    assert not (tmp_path / "out").exists()
