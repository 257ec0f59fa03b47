"""The seam in the SANA-WM refiner's transformer: one attention processor a layer, one forward pre-hook, and back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvpack.adapters.attention import PackedAttnProcessor, backend_of, check_all_attended, installed
from kvpack.memory.layer import AttendingLayer


class PackedSanaWMAttnProcessor(PackedAttnProcessor):
    """Self-attention of one layer over kvpack's memory; installed for the length of a chunk only."""

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
        """Stock attention but for the keys and values; upstream's rotations and cache are not used."""
        gates = None if attn.to_gate_logits is None else 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads)  # (b, l, h, d)
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, heads)
        if attn.rope_type == "split":
            query, key = _paired(query), _paired(key)
        value = attn.to_v(hidden_states).unflatten(2, heads)
        attended = self.attend(query, key, value).to(query.dtype)
        if gates is not None:
            attended = attended * gates.unsqueeze(-1)
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3)))


def _paired(vectors: Tensor) -> Tensor:
    """Channels whose partner is half a head away, side by side as kvpack turns them; scores are the same."""
    return vectors.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


@contextmanager
def attached(transformer: Any, memory_for: Callable[[str], Sequence[AttendingLayer]]) -> Iterator[None]:
    """Runs the transformer's self-attention over kvpack's memory, and leaves a stock transformer behind.

    Args:
        transformer: a `SanaWMLTX2RefinerTransformer3DModel`.
        memory_for: called before every forward with its `kv_cache_mode`; returns the memory of each layer.
    """
    attentions = [block.attn1 for block in transformer.transformer_blocks]
    processors = [PackedSanaWMAttnProcessor(backend_of(attention)) for attention in attentions]

    def before_forward(module: Any, args: Any, kwargs: Any) -> None:
        for processor, memory in zip(processors, memory_for(kwargs["kv_cache_mode"]), strict=True):
            processor.memory = memory

    handles = [
        transformer.register_forward_pre_hook(before_forward, with_kwargs=True),
        transformer.register_forward_hook(lambda *_: check_all_attended(processors)),
    ]
    try:
        with installed(dict(zip(attentions, processors, strict=True))):
            yield
    finally:
        for handle in handles:
            handle.remove()
