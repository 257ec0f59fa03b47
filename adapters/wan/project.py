"""Keys and values of hidden tokens by each layer's own projections, without a forward of the model."""

from collections.abc import Callable, Mapping
from typing import Any

from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor

from kvpack.adapters.wan.vae import onload, onloaded


@apply_lora_scale("attention_kwargs")  # type: ignore[untyped-decorator]
def project_tokens(
    transformer: Any,
    tokens: Tensor,
    modulation: Callable[[], Tensor],
    *,
    attention_kwargs: Mapping[str, Any] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Keys before RoPE and values of every layer, were the tokens its input.

    The first layer's are those of a forward, whose tokens have not met their context yet.

    Args:
        transformer: a `WanTransformer3DModel`.
        tokens: hidden tokens `[batch, tokens, width]`.
        modulation: gives shifts and scales of a clean token, `[batch, 6, width]`; called under LoRA's scale.
        attention_kwargs: those of the transformer's call; `scale` is that of its LoRA layers.
    """
    onload(transformer)
    shifts = modulation().float()
    projected = []
    for block in transformer.blocks:
        with onloaded(block):
            projected.append(_keys_values(block, tokens, shifts))
    return projected


def _keys_values(block: Any, tokens: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    attention = block.attn1
    shift, scale, *_ = (block.scale_shift_table + modulation).chunk(6, dim=1)
    hidden = (block.norm1(tokens.float()) * (1 + scale) + shift).type_as(tokens)
    if attention.fused_projections:
        _, keys, values = attention.to_qkv(hidden).chunk(3, dim=-1)
    else:
        keys, values = attention.to_k(hidden), attention.to_v(hidden)
    heads = (attention.heads, -1)
    return attention.norm_k(keys).unflatten(2, heads), values.unflatten(2, heads)
