"""Tiny pipelines with random weights, made in code: no files, no network."""

from typing import Any

import torch

WORDS = ("a", "the", "red", "green", "blue", "circle", "square", "triangle", "moving", "over", "night", "grass")

_TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
}


def tiny_tokenizer() -> Any:
    """Return a word-level tokenizer of a few words, for text encoders of `vocab_size` 32."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocab = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_wan_transformer(seed: int = 0, **config: Any) -> Any:
    """Return a `WanTransformer3DModel` of two layers with random weights."""
    from diffusers import WanTransformer3DModel

    return random_transformer(WanTransformer3DModel, seed, {**_TINY, **config})


def random_transformer(model: Any, seed: int, config: dict[str, Any]) -> Any:
    """Build a transformer whose random weights are large enough for its output to depend on every input."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        transformer = model(**config).eval()
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.data.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return transformer


def tiny_wan_pipeline(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    """Return a whole `WanPipeline` with random weights, made without files or network.

    Args:
        seed: of the weights; the process's random state is left alone.
        scheduler: `FlowMatchEulerDiscreteScheduler(shift=3)` if None.
        config: overrides of the transformer's config.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    return WanPipeline(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_wan_transformer(seed, **config),
        **_tiny_coders(seed),
    )


def tiny_skyreels_v2_pipeline(seed: int = 0, pipeline_class: Any = None, scheduler: Any = None, **config: Any) -> Any:
    """Return a SkyReels-V2 diffusion-forcing pipeline with random weights, made without files or network.

    Args:
        seed: of the weights; the process's random state is left alone.
        pipeline_class: one of the three; `SkyReelsV2DiffusionForcingPipeline` if None.
        scheduler: `UniPCMultistepScheduler(flow_shift=8, use_flow_sigmas=True)` if None.
        config: overrides of the transformer's config.
    """
    from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler

    flow = {"flow_shift": 8.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return (pipeline_class or SkyReelsV2DiffusionForcingPipeline)(
        scheduler=scheduler or UniPCMultistepScheduler(**flow),
        transformer=random_transformer(SkyReelsV2Transformer3DModel, seed, {**_TINY, **config}),
        **_tiny_coders(seed),
    )


def _tiny_coders(seed: int) -> dict[str, Any]:
    """Return a tokenizer, a text encoder and a VAE."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed + 1)
        vae = AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ).eval()
        text = UMT5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        text_encoder = UMT5EncoderModel(text).eval()
    return {"tokenizer": tiny_tokenizer(), "text_encoder": text_encoder, "vae": vae}


def tiny_anyflow_far_pipeline(seed: int = 0, **config: Any) -> Any:
    """Return a whole `AnyFlowFARPipeline` with random weights, made without files or network.

    Args:
        seed: of the weights; the process's random state is left alone.
        config: overrides of the transformer's config.
    """
    from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, FlowMapEulerDiscreteScheduler

    defaults = {**_TINY, "attention_head_dim": 16, "chunk_partition": (1, 3, 3, 3, 3, 3, 3, 2)}
    return AnyFlowFARPipeline(
        scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
        transformer=random_transformer(AnyFlowFARTransformer3DModel, seed, {**defaults, **config}),
        **_tiny_coders(seed),
    )
