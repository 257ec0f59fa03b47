"""The seam in a Wan transformer: one attention processor a layer, one forward pre-hook, and back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, CacheContext, HookRegistry, ModelHook, StateManager
from torch import Tensor

from kvpack.adapters.attention import PackedAttnProcessor, backend_of, check_all_attended, installed
from kvpack.adapters.compatibility import compiled_from
from kvpack.adapters.wan.prompt_cache import PromptCache, PromptedLayers
from kvpack.memory.layer import AttendingLayer

_HOOK_NAME = "kvpack_branch"


class PackedWanAttnProcessor(PackedAttnProcessor):
    """Self-attention of one Wan layer over kvpack's memory; installed for the length of a chunk only."""

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
        attended = self.attend(query, key, value.unflatten(2, heads))
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))


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
def attached(
    transformer: Any, memory_for: Callable[[CacheContext], Sequence[AttendingLayer]], prompt: PromptCache | None = None
) -> Iterator[None]:
    """Runs the transformer's self-attention over kvpack's memory, and leaves a stock transformer behind.

    Args:
        transformer: a `WanTransformer3DModel`.
        memory_for: called before every forward with the pipeline's branch and step; returns the memory of each layer.
        prompt: keys and values of the prompt, where they are not computed in every forward.

    Raises:
        UnsupportedPipelineError: if a forward leaves a layer's attention out.
    """
    transformer = compiled_from(transformer)
    attentions = [block.attn1 for block in transformer.blocks]
    processors = [PackedWanAttnProcessor(backend_of(attention)) for attention in attentions]
    prompted = PromptedLayers(transformer, prompt)

    def before_forward(context: CacheContext, embeds: Tensor) -> None:
        for processor, memory in zip(processors, memory_for(context), strict=True):
            processor.memory = memory
        prompted.before_forward(context.name, embeds)

    own = dict(zip(attentions, processors, strict=True))
    with _told(transformer, before_forward, processors), installed({**own, **prompted.processors}):
        yield


@contextmanager
def _told(
    transformer: Any, before_forward: Callable[[CacheContext, Tensor], None], processors: list[PackedWanAttnProcessor]
) -> Iterator[None]:
    """Calls `before_forward` with branch, step and text embeddings, and checks that every layer attended."""
    branch = _BranchHook()
    had_forward = "forward" in vars(transformer)
    hooks = HookRegistry.check_if_exists_or_initialize(transformer)

    def before(_: Any, args: Any, kwargs: Any) -> None:
        before_forward(branch.manager.context, kwargs["encoder_hidden_states"] if len(args) < 3 else args[2])

    def after(*_: Any) -> None:
        check_all_attended(processors)

    outside: Any = torch.compiler.disable  # where the whole transformer is compiled, not its blocks
    handles = [
        transformer.register_forward_pre_hook(outside(before), with_kwargs=True),
        transformer.register_forward_hook(outside(after)),
    ]
    try:
        hooks.register_hook(branch, _HOOK_NAME)
        yield
    finally:
        hooks.remove_hook(_HOOK_NAME, recurse=False)
        for handle in handles:
            handle.remove()
        if not had_forward:
            vars(transformer).pop("forward", None)
