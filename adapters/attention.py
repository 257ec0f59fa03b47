"""The seam of every family: an attention processor a layer and two hooks, in for a block of code and out again."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from kvpack.adapters.parallel import attended_by_heads
from kvpack.errors import UnsupportedPipelineError
from kvpack.generation.compile_boundary import OpaqueAttention, attend, begin_forward, end_forward, has_compiled_parts
from kvpack.generation.threads import one_thread, require_thread
from kvpack.memory.layer import AttendingLayer
from kvpack.memory.shard import Shard


class ForwardLayers:
    """Each layer's memory in the forward in progress; a layer takes its own once, in the thread that began."""

    def __init__(self) -> None:
        self._layers: dict[int, AttendingLayer] = {}
        self.thread = get_ident()

    def hand_out(self, layers: Sequence[AttendingLayer]) -> None:
        """Begin a forward with these memories."""
        self._layers = dict(enumerate(layers))  # anew: a forward that failed may have left some untaken

    def take(self, index: int) -> AttendingLayer:
        """Return a layer's memory, and raise `UnsupportedPipelineError` the second time."""
        require_thread(self.thread)
        if index not in self._layers:  # gradient checkpointing, or a block that is called twice
            raise UnsupportedPipelineError("a layer attended twice in one forward, which the memory would count twice")
        return self._layers.pop(index)  # what is left at the end was skipped

    def check_all_taken(self) -> None:
        """Raise `UnsupportedPipelineError` if the forward has left a layer's attention out."""
        if self._layers:
            raise UnsupportedPipelineError(
                f"a forward left the self-attention of layers {list(self._layers)} out, of which the memory would be "
                "stale; take the cache (TeaCache or the like) or whatever else skips layers off the transformer"
            )


class PackedAttnProcessor(OpaqueAttention):
    """Self-attention of one layer over kvpack's memory; in the model for the length of a chunk only.

    As it is, it serves attention with `to_q`, `to_k`, `to_v` and norms over all heads; a family overrides `project`
    and `output` where its own differs.

    Args:
        backend: diffusers' attention backend; None is the active one.
        layers: hands out the memory of each layer.
        index: of this layer.
        shard: the process, where several hold a layer's heads.
    """

    _attention_backend: Any = None  # diffusers sets a backend on processors that have this attribute only
    _parallel_config: Any = None

    def __init__(self, backend: Any, layers: ForwardLayers, index: int, shard: Shard | None = None) -> None:
        super().__init__()
        self._attention_backend, self.layers, self.index, self.shard = backend, layers, index, shard

    @classmethod
    def backend_of(cls, attention: Any) -> Any:
        """Return the backend that was set for an attention module, if its processor knows of any."""
        return getattr(attention.processor, "_attention_backend", None)

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the stock output but for the keys and values; rotations given by the model are not used."""
        queries, keys, values = self.project(attn, hidden_states)
        attended = attend(self, queries, [keys, values])
        # As stock processors do; kernels got the values' dtype.
        return self.output(attn, hidden_states, attended.type_as(queries))

    def attended(self, queries: Tensor, others: list[Tensor]) -> Tensor:
        """Return attention to the memory and to the chunk itself, out of sight of a compiler."""
        keys, values = others
        # Under CUDA's autocast norms give float32, and projections do not.
        queries, keys = queries.type_as(values), keys.type_as(values)
        layer = self.layers.take(self.index)
        attention = partial(dispatch_attention_fn, backend=self._attention_backend)
        if self.shard is not None:
            return attended_by_heads(self.shard, layer, queries, keys, values, attention)
        return layer.attend(queries, keys, values, attention)

    def project(self, attn: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normed queries, normed keys before RoPE, and values, `[batch, tokens, heads, head_dim]` each."""
        if getattr(attn, "fused_projections", False):  # attention that is not diffusers' may have none
            queries, keys, values = attn.to_qkv(hidden).chunk(3, dim=-1)
        else:
            # Modules are called, never their weights: LoRA, quantisation and leaf-level offload hook the call.
            queries, keys, values = attn.to_q(hidden), attn.to_k(hidden), attn.to_v(hidden)
        heads = (attn.heads, -1)
        queries, keys = attn.norm_q(queries).unflatten(2, heads), attn.norm_k(keys).unflatten(2, heads)  # (b, l, h, d)
        return queries, keys, values.unflatten(2, heads)  # [batch, tokens, heads, head_dim]

    def output(self, attn: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output of what was attended, `[batch, tokens, heads, head_dim]`."""
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3)))  # (b, l, h * d)


def paired(vectors: Tensor) -> Tensor:
    """Return channels whose RoPE partner is half a head away side by side, as kvpack rotates them."""
    return vectors.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # (b, l, h, 2 x d/2 -> d/2 x 2)


@contextmanager
def attached(
    transformer: Any,
    attentions: Iterable[Any],
    layers_for: Callable[[tuple[Any, ...], dict[str, Any]], Sequence[AttendingLayer]],
    processor: type[PackedAttnProcessor] = PackedAttnProcessor,
    others: Mapping[Any, Any] | None = None,
    shard: Shard | None = None,
) -> Iterator[None]:
    """Run a transformer's self-attention over kvpack's memory, and leave a stock transformer behind.

    Args:
        transformer: the model.
        attentions: self-attention of each layer.
        layers_for: called before every forward with its arguments; returns the memory of each layer.
        processor: what attends in each layer.
        others: processors for other attention modules, installed for as long.
        shard: the process, where several hold a layer's heads.

    Raises:
        UnsupportedPipelineError: if a forward leaves a layer's attention out, or runs it twice.
        BusyPipelineError: if it is in another thread, which may be that of a stock pipeline over the same transformer,
            or attached already.
    """
    layers, in_parts = ForwardLayers(), has_compiled_parts(transformer)  # looked up once: it walks all modules
    processors = {each: processor(processor.backend_of(each), layers, i, shard) for i, each in enumerate(attentions)}

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        require_thread(layers.thread)  # a hook runs for whoever calls, also for a pipeline that shares the model
        handed = layers_for(args, kwargs)  # tells the session of the forward, once for all layers
        if not (handed and getattr(handed[0], "differentiable", False)):  # a backward pass is yet to read them
            begin_forward(in_parts)
        layers.hand_out(handed)

    def after(_: Any, args: tuple[Any, ...], output: Any) -> Any:
        layers.check_all_taken()  # torch calls this hook only where the forward raised nothing
        return end_forward(output)

    outside: Any = torch.compiler.disable  # where the whole transformer is compiled, not its blocks
    # Torch's hooks, not diffusers': accelerate puts back a `forward` of its own, and what wrapped it is lost.
    with (
        one_thread(transformer, drives=True),  # first, so that a pipeline that is busy is refused untouched
        transformer.register_forward_pre_hook(outside(before), with_kwargs=True),
        transformer.register_forward_hook(outside(after)),
        installed({**processors, **(others or {})}),
    ):
        yield


@contextmanager
def installed(processors: Mapping[Any, Any]) -> Iterator[None]:
    """Give attention modules these processors, and their own back, with the backend that was set meanwhile."""
    # The objects themselves, which may have options of their own.
    replaced = {attention: attention.processor for attention in processors}
    backends = {attention: getattr(each, "_attention_backend", None) for attention, each in processors.items()}
    try:
        for attention, processor in processors.items():
            attention.set_processor(processor)
        yield
    finally:
        for attention, processor in replaced.items():
            # A callback may have called set_attention_backend().
            backend = getattr(processors[attention], "_attention_backend", None)
            if backend is not backends[attention]:
                processor._attention_backend = backend
            attention.set_processor(processor)
