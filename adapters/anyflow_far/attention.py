"""The seam in an AnyFlow-FAR transformer: one attention processor a layer, one forward pre-hook, and back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpack.adapters.attention import PackedAttnProcessor, check_all_attended, installed
from kvpack.adapters.wan.prompt_cache import PromptCache, PromptedLayers
from kvpack.memory.layer import AttendingLayer

#: Upstream pads queries, keys and values to a multiple of this.
_FLEX_BLOCK = 128


class PackedAnyFlowAttnProcessor(PackedAttnProcessor):
    """Self-attention of one AnyFlow-FAR layer over kvpack's memory; installed for the length of a chunk only."""

    #: Whether keys and values of zeros are attended, as many as upstream's padding has.
    padded = False

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        rotary_emb: dict[str, Tensor] | None = None,
        kv_cache: dict[str, Tensor] | None = None,
        kv_cache_flag: dict[str, Any] | None = None,
    ) -> Tensor:
        """Stock attention but for the keys and values; `rotary_emb` starts at frame 0 and is not used."""
        heads, dtype = (attn.heads, -1), hidden_states.dtype
        query = attn.norm_q(attn.to_q(hidden_states)).to(dtype).unflatten(2, heads)  # (b, l, h, d)
        key = attn.norm_k(attn.to_k(hidden_states)).to(dtype).unflatten(2, heads)
        value = attn.to_v(hidden_states).unflatten(2, heads)
        attended = self.attend(query, key, value)
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.padded:
            zeros = (0, 0, 0, 0, 0, -query.shape[1] % _FLEX_BLOCK)
            key, value = pad(key, zeros), pad(value, zeros)
        return super()._attention(query, key, value)


@contextmanager
def attached(
    transformer: Any,
    next_forward: Callable[[], tuple[Sequence[AttendingLayer], bool]],
    prompt: PromptCache | None = None,
) -> Iterator[None]:
    """Runs the transformer's self-attention over kvpack's memory, and leaves a stock transformer behind.

    Every forward takes the transformer's path for one chunk behind a cache, whatever its caller has asked for.

    Args:
        transformer: an `AnyFlowFARTransformer3DModel`.
        next_forward: called before every forward; returns the memory of each layer, and whether zeros are attended.
        prompt: keys and values of the prompt, where they are not computed in every forward.
    """
    attentions = [block.attn1 for block in transformer.blocks]
    # The stock class says flex, for a block mask that kvpack has no use for; a backend that was set is kept.
    backends = [vars(attention.processor).get("_attention_backend") for attention in attentions]
    processors = [PackedAnyFlowAttnProcessor(backend) for backend in backends]

    prompted = PromptedLayers(transformer, prompt)

    def before_forward(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        memories, padded = next_forward()
        for processor, memory in zip(processors, memories, strict=True):
            processor.memory, processor.padded = memory, padded
        prompted.before_forward("all", kwargs["encoder_hidden_states"])
        flag = {"num_cached_chunks": 0, "is_cache_step": False}
        return args, {**kwargs, "kv_cache": [None] * len(processors), "kv_cache_flag": flag}

    handles = [
        transformer.register_forward_pre_hook(before_forward, with_kwargs=True),
        transformer.register_forward_hook(lambda *_: check_all_attended(processors)),
    ]
    try:
        with installed({**dict(zip(attentions, processors, strict=True)), **prompted.processors}):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def clean_times_for(transformer: Any, tokens: int) -> Iterator[None]:
    """Gives `tokens` more tokens, behind those of clean latents, the same time as these: every token has its own.

    Args:
        transformer: an `AnyFlowFARTransformer3DModel`.
        tokens: hidden tokens that ride in the forwards.
    """

    def lengthened(_: Any, __: Any, embedded: tuple[Any, ...]) -> tuple[Any, ...]:
        times = (torch.cat([each, each[:, :1].expand(-1, tokens, -1)], dim=1) for each in embedded[:2])
        return (*times, *embedded[2:])

    handle = transformer.condition_embedder.register_forward_hook(lengthened)
    try:
        yield
    finally:
        handle.remove()
