"""LoRA adapters as users handle them: loaded, scaled, chosen between chunks, fused; history has their keys too."""

from functools import partial

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from helpers import enable_small, generated, quiet, rel_l2
from kvpack.testing import tiny_wan_pipeline, tiny_wan_transformer

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 32,
    "num_frames": 29,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
CHUNK = {"num_frames": 5}  # two latent frames
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


generate = partial(generated, **CALL)


def lora(seed):
    """The file of a LoRA whose output is not zero."""
    transformer = tiny_wan_transformer()
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(seed)
    weights = get_peft_model_state_dict(transformer)
    return {f"transformer.{name}": torch.randn(w.shape, generator=generator) / 4 for name, w in weights.items()}


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline())


@pytest.fixture
def loaded(pipe):
    pipe.load_lora_weights(lora(1), adapter_name="one")
    pipe.load_lora_weights(lora(2), adapter_name="two")
    pipe.set_adapters("one")
    return pipe


def test_loaded_and_unloaded(pipe):
    plain = generate(enable_small(pipe))
    pipe.load_lora_weights(lora(1), adapter_name="one")
    adapted = generate(pipe)
    assert rel_l2(adapted, plain) > 1e-2
    pipe.disable_packforcing()
    stock = generate(pipe, **CHUNK)
    enable_small(pipe)
    assert rel_l2(generate(pipe, **CHUNK), stock) <= 1e-6
    assert torch.equal(generate(pipe), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), plain)


def test_fused_is_loaded(loaded):
    adapted = generate(enable_small(loaded))
    loaded.fuse_lora(adapter_names=["one"])
    assert rel_l2(generate(loaded), adapted) < 1e-5
    loaded.unfuse_lora()
    assert rel_l2(generate(loaded), adapted) < 1e-5


def test_the_scale_of_a_call_is_that_of_an_adapter(loaded):
    """In the commit and in the prompt's keys too, else the second chunk would differ."""
    enable_small(loaded)
    scaled = generate(loaded, attention_kwargs={"scale": 0.5})
    loaded.set_adapters("one", adapter_weights=0.5)
    assert rel_l2(generate(loaded), scaled) < 1e-6


def change_between_chunks(pipe, change):
    """Four chunks, in the middle of which somebody does something to the model."""
    stream = pipe.packforcing.stream(**CALL, generator=torch.Generator().manual_seed(0))
    chunks = [next(stream), next(stream)]
    change()
    chunks += [next(stream), next(stream)]
    stream.close()
    return torch.cat(chunks, dim=2)


def test_adapters_between_two_chunks(loaded):
    enable_small(loaded)
    unchanged = change_between_chunks(loaded, lambda: None)
    chosen = change_between_chunks(loaded, lambda: loaded.set_adapters("two"))
    loaded.set_adapters("one")
    fused = change_between_chunks(loaded, lambda: (loaded.set_adapters("two"), loaded.fuse_lora(adapter_names=["two"])))
    assert torch.equal(chosen[:, :, :4], unchanged[:, :, :4])
    assert rel_l2(chosen[:, :, 4:], unchanged[:, :, 4:]) > 1e-2
    assert rel_l2(fused, chosen) < 1e-5
