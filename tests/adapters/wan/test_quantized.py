"""Quantised weights: the video of kvpack over them. Needs torchao, which warns at every import on a CPU."""

import pytest
import torch
from diffusers import WanTransformer3DModel

import kvpack
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


def generate(pipe, **changed):
    return pipe(**{**CALL, "generator": torch.Generator().manual_seed(0), **changed}).frames


def enable(pipe, **options):
    return kvpack.enable(pipe, "packforcing", chunk_frames=2, sink_frames=1, recent_frames=1, topk=1, **options)


def rel_l2(given, wanted):
    return float((given - wanted).norm() / wanted.norm())


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
    enable(pipe, **STACKS[stack])
    assert torch.equal(generate(pipe, num_frames=5), stock)
    frames = generate(pipe)
    assert frames.isfinite().all()
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipe), frames)
    pipe.disable_packforcing()
    assert torch.equal(generate(pipe, num_frames=5), stock)
