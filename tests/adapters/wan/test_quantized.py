"""Quantised weights: the video of kvpack over them. Needs torchao, which warns at every import on a CPU."""

from functools import partial

import pytest
import torch
from diffusers import WanTransformer3DModel

from helpers import enable_small, generated, rel_l2
from kvpack.policies import LowResolutionCompressor
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 32,
    "num_frames": 25,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
STACKS = {
    "pool": {},
    "lr": {"compressor": "lr"},
    "direct": {"compressor": LowResolutionCompressor(project="direct")},
}


generate = partial(generated, **CALL)


@pytest.mark.parametrize("stack", STACKS)
def test_int8_weights(stack, tmp_path):
    """`quantization_config` of diffusers with torchao: one chunk is the stock video of the same quantised weights."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from diffusers import TorchAoConfig

    pipe = tiny_wan_pipeline(attention_head_dim=32)
    exact = generate(pipe, num_frames=5)
    pipe.transformer.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pipe.transformer = WanTransformer3DModel.from_pretrained(
        tmp_path, quantization_config=config, torch_dtype=torch.bfloat16
    )
    quantised = [type(block.attn2.to_k.weight).__name__ for block in pipe.transformer.blocks]
    assert quantised == ["Int8Tensor", "Int8Tensor"]
    stock = generate(pipe, num_frames=5)
    assert 1e-3 < rel_l2(stock, exact) < 0.1
    enable_small(pipe, **STACKS[stack])
    assert torch.equal(generate(pipe, num_frames=5), stock)
    frames = generate(pipe)
    assert frames.isfinite().all()
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipe), frames)
    pipe.disable_packforcing()
    assert torch.equal(generate(pipe, num_frames=5), stock)
