"""Every adapter does what all must do; a broken one is told what is wrong."""

import torch

from kvpack.testing import check_adapter, tiny_wan_pipeline


def wan_call(chunks):
    return {
        "prompt": "a red circle",
        "height": 16,
        "width": 16,
        "num_frames": 16 * chunks - 3,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }


def test_wan():
    check_adapter(tiny_wan_pipeline(), wan_call)
