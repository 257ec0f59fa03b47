"""The seam in a Wan transformer: one attention processor a layer, one forward pre-hook, and back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.hooks.hooks import BaseState, CacheContext, HookRegistry, ModelHook, StateManager
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from kvpack.opaque import Slot, attend
from kvpack.packed import AttendingLayer

_HOOK_NAME = "kvpack_branch"


class PackedWanAttnProcessor(Slot):
    """Self-attention of one Wan layer over kvpack's memory; installed for the length of a chunk only.

    Args:
        replaced: the processor whose backend is kept.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, replaced: Any) -> None:
        super().__init__()
        self._attention_backend = getattr(replaced, "_attention_backend", None)
        self.memory: AttendingLayer | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Stock attention but for the keys and values; `rotary_emb` starts at frame 0 and is not used."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        heads = (attn.heads, -1)
        query, key = attn.norm_q(query).unflatten(2, heads), attn.norm_k(key).unflatten(2, heads)  # (b, l, h, d)
        attended = attend(self, query, [key, value.unflatten(2, heads)])
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))

    def attended(self, queries: Tensor, others: list[Tensor]) -> Tensor:
        """Attention to the memory and to the chunk's own keys and values."""
        assert self.memory is not None
        keys, values = others
        return self.memory.attend(queries, keys, values, self._attention)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend)


class _NoState(BaseState):
    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to reset; the memory lives in a session."""


class _BranchHook(ModelHook):
    """Hears which guidance branch and step the pipeline is in, as `cache_context` tells it."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.manager = StateManager(_NoState)  # type: ignore[arg-type]

    def reset_state(self, module: Any) -> Any:
        """Forgets the branch."""
        self.manager.reset()
        return module


@contextmanager
def attached(transformer: Any, memory_for: Callable[[CacheContext], Sequence[AttendingLayer]]) -> Iterator[None]:
    """Runs the transformer's self-attention over kvpack's memory, and leaves a stock transformer behind.

    Args:
        transformer: a `WanTransformer3DModel`.
        memory_for: called before every forward with the pipeline's branch and step; returns the memory of each layer.
    """
    attentions = [block.attn1 for block in transformer.blocks]
    replaced = [attention.processor for attention in attentions]
    processors = [PackedWanAttnProcessor(processor) for processor in replaced]
    branch = _BranchHook()
    had_forward = "forward" in vars(transformer)
    hooks = HookRegistry.check_if_exists_or_initialize(transformer)

    def before_forward(module: Any, args: Any, kwargs: Any) -> None:
        for processor, memory in zip(processors, memory_for(branch.manager.context), strict=True):
            processor.memory = memory

    handle = transformer.register_forward_pre_hook(before_forward, with_kwargs=True)
    try:
        hooks.register_hook(branch, _HOOK_NAME)
        for attention, processor in zip(attentions, processors, strict=True):
            attention.set_processor(processor)
        yield
    finally:
        for attention, processor in zip(attentions, replaced, strict=True):
            attention.set_processor(processor)
        hooks.remove_hook(_HOOK_NAME, recurse=False)
        handle.remove()
        if not had_forward:
            vars(transformer).pop("forward", None)
