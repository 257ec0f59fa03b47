"""A tiny SANA-WM refiner with random weights, made in code: no files, no network."""

from typing import Any

import torch

from kvpack.testing.pipelines import random_transformer, tiny_tokenizer

_TEXT = {"width": 16, "layers": 2, "tokens": 16}


def tiny_sana_wm_transformer(seed: int = 0, **config: Any) -> Any:
    """Return a `SanaWMLTX2RefinerTransformer3DModel` of two layers with random weights."""
    from diffusers import SanaWMLTX2RefinerTransformer3DModel

    defaults = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,  # 16 pairs over the width are not a multiple of 3 axes: one is padding
        "cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": _TEXT["width"],
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 1,
        "audio_attention_head_dim": 12,
        "audio_cross_attention_dim": 12,
    }
    return random_transformer(SanaWMLTX2RefinerTransformer3DModel, seed, {**defaults, **config})


def tiny_sana_wm_refiner(seed: int = 0, *, vae: bool = True, **config: Any) -> Any:
    """Return a whole `SanaWMLTX2Refiner` with random weights, made without files or network.

    Args:
        seed: of the weights; the process's random state is left alone.
        vae: whether it can decode.
        config: overrides of the transformer's config.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaWMLTX2Refiner

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed + 1)
        parts = {"connectors": _connectors(), "text_encoder": _text_encoder(), "vae": _vae() if vae else None}
    return SanaWMLTX2Refiner(
        transformer=tiny_sana_wm_transformer(seed, **config),
        tokenizer=tiny_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_max_sequence_length=_TEXT["tokens"],
        **parts,
    )


def _text_encoder() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(
        vocab_size=32,
        hidden_size=_TEXT["width"],
        intermediate_size=32,
        num_hidden_layers=_TEXT["layers"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_use_head=False,
    )
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=1, boi_token_index=29, eoi_token_index=30
    )
    config.image_token_id = 31
    return Gemma3ForConditionalGeneration(config).eval()


def _connectors() -> Any:
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    return LTX2TextConnectors(
        caption_channels=_TEXT["width"],
        text_proj_in_factor=_TEXT["layers"] + 1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
    ).eval()


def _vae() -> Any:
    from diffusers import AutoencoderKLLTX2Video

    return AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    ).eval()
