"""Self-attention of the SANA-WM refiner over kvpack's memory."""

from typing import Any

import torch
from torch import Tensor

from kvpack.adapters.attention import PackedAttnProcessor, paired


class PackedSanaWMAttnProcessor(PackedAttnProcessor):
    """Self-attention of one layer, with gates and RoPE of halves."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        sink_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
    ) -> Tensor:
        """Return the stock output but for keys and values; upstream looks which of these arguments there are."""
        return super().__call__(attn, hidden_states)

    def project(self, attn: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, with RoPE's pairs side by side."""
        queries, keys, values = super().project(attn, hidden)
        return (paired(queries), paired(keys), values) if attn.rope_type == "split" else (queries, keys, values)

    def output(self, attn: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output, gated head by head if the layer has gates."""
        if attn.to_gate_logits is not None:
            # Twice, as upstream, so that a gate that begins with zeros is 1.
            attended = attended * (2.0 * torch.sigmoid(attn.to_gate_logits(hidden))).unsqueeze(-1)  # (b, l, h, 1)
        return super().output(attn, hidden, attended)
