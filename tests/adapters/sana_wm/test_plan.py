"""What a plan says of the refiner is what it then does."""

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.utils.flop_counter import FlopCounterMode

from helpers import told
from kvpack.adapters.sana_wm.adapter import SanaWMAdapter
from kvpack.planning.planner import plan
from kvpack.plugins.registry import registry
from kvpack.testing import tiny_sana_wm_refiner, tiny_sana_wm_transformer

#: The config of the released checkpoint, as far as a plan needs it: diffusers' defaults, at 1280x704.
REFINER = {
    "num_layers": 48,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "patch_size": 1,
    "vae_scale_factors": (8, 32, 32),
    "pos_embed_max_pos": 20,
    "base_height": 2048,
    "base_width": 2048,
    "causal_offset": 1,
    "rope_theta": 10000.0,
    "rope_double_precision": True,
}


def test_the_refiner_at_720p():
    """Computed: 880 tokens a frame, of which each holds 768 KiB in bf16, so that its own window is 7.1 GiB."""
    geometry = SanaWMAdapter().geometry({"transformer": REFINER}, 704, 1280, torch.bfloat16)
    planned = plan(geometry, registry().stack("sana-wm", {}), 481, steps=3)
    assert geometry.tokens_per_frame == 880
    assert geometry.kv_bytes_per_token == 768 * 1024
    assert planned.attended_kv_bytes == 11 * 880 * 768 * 1024


@pytest.mark.parametrize("name", ["sana-wm", "packforcing"])
def test_planned_tokens_are_the_measured_tokens(name):
    pipe = tiny_sana_wm_refiner()
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_packforcing(name, **({"topk": 2} if name == "packforcing" else {}), chunk_frames=3)
    pipe(torch.zeros(1, 4, 31, 2, 3), "a", fps=16.0, output_type="latent")
    geometry = SanaWMAdapter().geometry({"transformer": pipe.transformer.config}, 64, 96, torch.float32)
    planned = plan(geometry, pipe.packforcing.stack, 30, steps=3)
    measured = pipe.packforcing.stats()
    assert planned.attended_kv_bytes == measured["attended_bytes"]
    assert planned.attended_tokens == measured["attended_tokens"] + planned.chunk_tokens


def test_operations_of_a_layer_are_those_of_the_stock_forward():
    def counted(layers):
        transformer, tokens, text = tiny_sana_wm_transformer(num_layers=layers), 24, 1024
        rotary = transformer.build_rotary_emb_for_absolute_positions(1, [0, 1, 2, 3], 2, 3, torch.device("cpu"), 16.0)
        with attention_backend("native"), FlopCounterMode(display=False) as counter, torch.no_grad():
            transformer(
                torch.zeros(1, tokens, 4),
                torch.zeros(1, text, 16),
                torch.zeros(1, tokens),
                rotary,
                encoder_attention_mask=torch.ones(1, text),
            )
        return transformer.config, counter.get_total_flops()

    (_, one), (config, three) = counted(1), counted(3)
    attention = 4 * 3 * 24 * (24 + 1024) * 32  # not counted on a CPU
    assert 3 * (three - one) == 2 * (SanaWMAdapter().forward_flops({"transformer": config}, 24, 24) - attention)


def test_a_folder_without_weights_or_vae_is_planned(tmp_path):
    pipe = tiny_sana_wm_refiner(vae=False)
    pipe.save_config(tmp_path)
    pipe.transformer.save_config(tmp_path / "transformer")
    words = ["plan", "--model", str(tmp_path), "--size", "64x64", "--seconds", "5", "--stack", "sana-wm", "--json"]
    planned = told(*words)
    assert planned["kv_bytes_per_token"] == 2 * 2 * 32 * 2
    assert (planned["pixel_frames"], planned["frames"]) == (73, 10)  # of 80, what a VAE of 8 frames to one decodes
