"""The seam in the SANA-WM refiner's transformer: one attention processor a layer, one forward pre-hook, and back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from kvpack.packed import AttendingLayer


class PackedSanaWMAttnProcessor:
    """Self-attention of one layer over kvpack's memory; installed for the length of a chunk only.

    Args:
        replaced: the processor whose backend is kept.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, replaced: Any) -> None:
        self._attention_backend = getattr(replaced, "_attention_backend", None)
        self.memory: AttendingLayer | None = None

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
        assert self.memory is not None
        value = attn.to_v(hidden_states).unflatten(2, heads)
        attended = self.memory.attend(query, key, value, self._attention).to(query.dtype)
        if gates is not None:
            attended = attended * gates.unsqueeze(-1)
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3)))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend)


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
    replaced = [attention.processor for attention in attentions]
    processors = [PackedSanaWMAttnProcessor(processor) for processor in replaced]

    def before_forward(module: Any, args: Any, kwargs: Any) -> None:
        for processor, memory in zip(processors, memory_for(kwargs["kv_cache_mode"]), strict=True):
            processor.memory = memory

    handle = transformer.register_forward_pre_hook(before_forward, with_kwargs=True)
    try:
        for attention, processor in zip(attentions, processors, strict=True):
            attention.set_processor(processor)
        yield
    finally:
        for attention, processor in zip(attentions, replaced, strict=True):
            attention.set_processor(processor)
        handle.remove()
