"""The seam in an AnyFlow-FAR transformer: one chunk behind an empty cache in every forward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpack.adapters import attention
from kvpack.adapters.wan.prompt_cache import PromptedLayers
from kvpack.memory.attended import Attention
from kvpack.memory.layer import AttendingLayer

#: Upstream pads queries, keys and values to a multiple of this.
_FLEX_BLOCK = 128


class PackedAnyFlowAttnProcessor(attention.PackedAttnProcessor):
    """Self-attention of one AnyFlow-FAR layer over kvpack's memory."""

    @classmethod
    def backend_of(cls, attention: Any) -> Any:
        """Return a backend that was set; the stock class says flex, for a block mask that is not needed here."""
        return vars(attention.processor).get("_attention_backend")

    def project(self, attn: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values in the dtype of the hidden states."""
        queries, keys, values = super().project(attn, hidden)
        return queries.to(hidden.dtype), keys.to(hidden.dtype), values  # as upstream: its norms give float32


@dataclass(frozen=True)
class Padded:
    """A layer that attends keys and values of zeros too, as many as upstream's padding has."""

    layer: AttendingLayer

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        """Return attention to the memory, to the current tokens and to zeros."""

        def padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # As many as the queries lack; padded queries change nothing.
            zeros = (0, 0, 0, 0, 0, -query.shape[1] % _FLEX_BLOCK)
            return attention(query, pad(key, zeros), pad(value, zeros))

        return self.layer.attend(queries, keys, values, padded)


@contextmanager
def attached(
    transformer: Any, layers_for: Callable[[], Sequence[AttendingLayer]], prompted: PromptedLayers
) -> Iterator[None]:
    """Run the transformer's self-attention over kvpack's memory, and leave a stock transformer behind.

    Every forward takes the transformer's path for one chunk behind a cache, whatever its caller has asked for.

    Args:
        transformer: an `AnyFlowFARTransformer3DModel`.
        layers_for: called before every forward; returns the memory of each layer.
        prompted: cross-attentions whose prompt is computed once.
    """
    cache = {
        "kv_cache": [None] * len(transformer.blocks),  # not None, so that the forward is the one for inference
        "kv_cache_flag": {"num_cached_chunks": 0, "is_cache_step": False},  # so that it counts this chunk alone
    }

    def before_forward(_: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[AttendingLayer]:
        prompted.before_forward("all", kwargs["encoder_hidden_states"])  # guidance branches are rows of one forward
        return layers_for()

    def one_chunk(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **cache}

    attentions, processor = [block.attn1 for block in transformer.blocks], PackedAnyFlowAttnProcessor
    with (
        attention.attached(transformer, attentions, before_forward, processor, prompted.processors),
        transformer.register_forward_pre_hook(one_chunk, with_kwargs=True),
    ):
        yield


@contextmanager
def clean_times_for(transformer: Any, tokens: int) -> Iterator[None]:
    """Give `tokens` more tokens, behind those of clean latents, the same time as these: every token has its own.

    Args:
        transformer: an `AnyFlowFARTransformer3DModel`.
        tokens: hidden tokens that are appended in the forwards.
    """

    def lengthened(_: Any, __: Any, embedded: tuple[Any, ...]) -> tuple[Any, ...]:
        # Times and modulations; what follows them has no axis of tokens of the video.
        times = (torch.cat([each, each[:, :1].expand(-1, tokens, -1)], dim=1) for each in embedded[:2])
        return (*times, *embedded[2:])

    with transformer.condition_embedder.register_forward_hook(lengthened):
        yield
