"""Cross-attention of a Wan transformer to a prompt whose keys and values are computed once."""

from typing import Any, ClassVar

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from kvpack.adapters.offload import streams_in
from kvpack.generation.compile_boundary import OpaqueAttention, attend, compiled_from

#: Keys and values of the prompt in one layer, once they are computed.
_Kept = list[Tensor]


class PromptCache:
    """Keys and values of each guidance branch's prompt, layer by layer.

    They hold for as long as nobody else's code runs, which may change weights or adapters in ways that leave no trace:
    who runs a callback, or hands a chunk out, calls `forget`.
    """

    def __init__(self) -> None:
        self._branches: dict[str, tuple[Tensor, list[_Kept]]] = {}

    def forget(self) -> None:
        """Compute all of them anew when they are needed next."""
        self._branches.clear()

    def layers(self, branch: str, embeds: Tensor, count: int) -> list[_Kept]:
        """Return what is kept of a branch's prompt in each of `count` layers; empty for other `embeds`."""
        kept = self._branches.get(branch)
        # By identity, which no other tensor can have while this one is held; `==` would wait for the device.
        if kept is None or kept[0] is not embeds:
            kept = self._branches[branch] = embeds, [[] for _ in range(count)]
        return kept[1]


def serves(attention: Any, stock: type) -> bool:
    """Return whether a cross-attention has the `stock` processor, and no image beside the text."""
    # A subclass may compute other keys.
    return type(attention.processor) is stock and getattr(attention, "add_k_proj", None) is None


class PromptWanAttnProcessor(OpaqueAttention):
    """Cross-attention of one Wan layer, bit-equal to the stock one; installed for the length of a chunk only.

    Args:
        attention: the layer's cross-attention, whose backend is kept.
        forward: what is kept in each layer of the prompt of the forward in progress.
        index: of the layer.
    """

    keeps: ClassVar[bool] = False  # nothing that compiled code gives: what stays is computed here
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, attention: Any, forward: list[_Kept], index: int) -> None:
        super().__init__()
        self._attention_backend = attention.processor._attention_backend
        self._module, self._forward, self._index = attention, forward, index

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the stock output; cross-attention has neither mask nor RoPE."""
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))  # (b, l, h, d)
        attended = attend(self, query, [encoder_hidden_states])
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))  # (b, l, h * d)

    def attended(self, queries: Tensor, others: list[Tensor]) -> Tensor:
        """Return attention to the prompt."""
        kept = self._forward[self._index]
        if not kept:
            kept += self._keys_values(others[0])  # in place, into the list that the cache holds
        keys, values = kept
        return dispatch_attention_fn(queries, keys, values, backend=self._attention_backend)

    def _keys_values(self, text: Tensor) -> _Kept:
        attention = self._module
        if getattr(attention, "fused_projections", False):
            keys, values = attention.to_kv(text).chunk(2, dim=-1)
        else:
            keys, values = attention.to_k(text), attention.to_v(text)
        heads = (attention.heads, -1)
        return [attention.norm_k(keys).unflatten(2, heads), values.unflatten(2, heads)]  # (b, text, h, d)


class PromptedLayers:
    """A transformer's cross-attentions whose prompt is computed once.

    Args:
        transformer: has `blocks` with an `attn2`; as it is or compiled.
        prompt: what is kept; None leaves all of them stock.
        stock: the processor that the family's cross-attentions have; any other stays.
    """

    def __init__(self, transformer: Any, prompt: PromptCache | None, stock: type) -> None:
        transformer = compiled_from(transformer)
        every = [] if prompt is None else [block.attn2 for block in transformer.blocks]
        attentions = [attention for attention in every if serves(attention, stock)]
        self._forward: list[_Kept] = []  # one list, filled anew for each forward, that all processors look into
        #: What is to be installed.
        self.processors = {each: PromptWanAttnProcessor(each, self._forward, i) for i, each in enumerate(attentions)}
        self._prompt = prompt
        # A projection that a forward leaves out would break the order in which streamed groups are fetched ahead.
        #: Whether all of them are computed in every forward.
        self._anew = bool(attentions) and (_is_hooked(transformer) or _is_fetched_ahead(attentions[0]))

    def before_forward(self, branch: str, embeds: Tensor) -> None:
        """Hand each layer what is kept of these text embeddings."""
        if self._prompt is None:
            return
        if self._anew:
            self._prompt.forget()
        self._forward[:] = self._prompt.layers(branch, embeds, len(self.processors))


def _is_fetched_ahead(attention: Any) -> bool:
    projection = attention.to_kv if getattr(attention, "fused_projections", False) else attention.to_k
    return any(map(streams_in, projection.modules()))  # behind LoRA the linear layer is inside


def _is_hooked(transformer: Any) -> bool:
    """Return whether torch hooks of others run in its forwards, which may change anything in them."""
    kinds = (each for module in transformer.modules() for each in (module._forward_pre_hooks, module._forward_hooks))
    hooks = (hook for each in kinds if each for hook in each.values())
    # Those of kvpack's own, as a SkyReels denoiser's, change nothing of the prompt.
    return any(not getattr(hook, "__module__", "").startswith("kvpack.") for hook in hooks)
