"""Offloaded, placed and cast: the video of plain kvpack over the same weights."""

from functools import partial

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from diffusers import WanPipeline, WanTransformer3DModel

from helpers import enable_small, generated, quiet, rel_l2
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
CPU = torch.device("cpu")
STACKS = {
    "pool": {},
    "lr": {"compressor": "lr"},
    "direct": {"compressor": LowResolutionCompressor(project="direct")},
}


generate = partial(generated, **CALL)


def pipeline(**config):
    return quiet(tiny_wan_pipeline(**config))


def offload_everything(pipe, folder):
    pipe.enable_group_offload(CPU, CPU, offload_type="leaf_level")


def offload_to_disk(pipe, folder):
    """Weights that are not brought in are not there at all."""
    for name in ("transformer", "vae"):
        kind = {"offload_type": "block_level", "num_blocks_per_group": 1, "offload_to_disk_path": str(folder / name)}
        getattr(pipe, name).enable_group_offload(CPU, CPU, **kind)


def offload_models(pipe, folder):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_every_layer(pipe, folder):
    """Sequential offload of the transformer; that of the whole pipeline fails without kvpack, with this torch."""
    cpu_offload(pipe.transformer, execution_device=CPU)


def dispatch(pipe, folder):
    """A device for each part."""
    parts = [name for name, _ in pipe.transformer.named_children() if name != "blocks"]
    placed = dict.fromkeys([*parts, "blocks.0", "blocks.1", "scale_shift_table"], "cpu")
    dispatch_model(pipe.transformer, placed, force_hooks=True)


PLACES = [offload_everything, offload_to_disk, offload_models, offload_every_layer, dispatch]


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")  # accelerate's, of a parameter
@pytest.mark.parametrize("stack", ["pool", "lr", "direct"])
@pytest.mark.parametrize(
    "place", [each if each is offload_to_disk else pytest.param(each, marks=pytest.mark.slow) for each in PLACES]
)
def test_placed(place, stack, tmp_path):
    frames = generate(enable_small(pipeline(), **STACKS[stack]), output_type="pt")
    before, after = pipeline(), pipeline()
    place(before, tmp_path / "before")
    enable_small(before, **STACKS[stack])
    enable_small(after, **STACKS[stack])
    place(after, tmp_path / "after")
    for pipe in (before, after, after):
        assert torch.equal(generate(pipe, output_type="pt"), frames)


def test_device_map(tmp_path):
    pipeline().save_pretrained(tmp_path)
    plain = WanPipeline.from_pretrained(tmp_path)
    placed = WanPipeline.from_pretrained(tmp_path, device_map="cpu")
    automatic = WanPipeline.from_pretrained(
        tmp_path,
        transformer=WanTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer", device_map="auto"),
    )
    assert placed.hf_device_map == "cpu"
    for pipe in (placed, automatic):
        # Loaded weights lie elsewhere in memory: other kernels
        assert rel_l2(generate(enable_small(pipe)), generate(enable_small(plain))) <= 1e-6


def test_another_dtype_between_two_videos():
    pipe = enable_small(pipeline())
    frames = generate(pipe)
    pipe.to(torch.float64)
    assert rel_l2(generate(pipe).float(), frames) < 1e-5
    buffers = []

    def look(pipe, step, timestep, tensors):
        session = pipe.packforcing.sessions["cond"]
        pairs = [session.attended(layer) for layer in range(session.geometry.layers)]
        buffers.append({(each.dtype, each.device) for pair in pairs for each in pair})
        return tensors

    generate(pipe, callback_on_step_end=look)
    assert buffers == [{(torch.float64, CPU)}] * len(buffers) != []


def test_layerwise_casting():
    """Weights kept in another dtype than computed with: one chunk is the stock video."""
    pipe = pipeline()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    stock = generate(pipe, num_frames=5)
    enable_small(pipe)
    assert rel_l2(generate(pipe, num_frames=5), stock) <= 1e-6
    assert generate(pipe).isfinite().all()
