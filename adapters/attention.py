"""What the attention processors of all families share: a layer's memory, the backend that is kept, in and out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from kvpack.errors import UnsupportedPipelineError
from kvpack.generation.compile_boundary import Slot, attend
from kvpack.memory.layer import AttendingLayer


class PackedAttnProcessor(Slot):
    """Attention of one layer over kvpack's memory; installed for the length of a chunk only.

    Args:
        backend: diffusers' attention backend; None is the active one.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._attention_backend = backend
        self.memory: AttendingLayer | None = None

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention to the memory and to the chunk's own keys and values, `[batch, tokens, heads, head_dim]` each."""
        return attend(self, queries, [keys, values])

    def attended(self, queries: Tensor, others: list[Tensor]) -> Tensor:
        """The same, out of sight of a compiler."""
        memory, self.memory = self.memory, None  # once a forward
        if memory is None:
            raise UnsupportedPipelineError("a layer attended twice in one forward, which the memory would count twice")
        keys, values = others
        return memory.attend(queries, keys, values, self._attention)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend)


def backend_of(attention: Any) -> Any:
    """The backend that was set for an attention module, if its processor knows of any."""
    return getattr(attention.processor, "_attention_backend", None)


def check_all_attended(processors: Sequence[PackedAttnProcessor]) -> None:
    """Raises `UnsupportedPipelineError` if a forward has left a layer's attention out."""
    left_out = [index for index, processor in enumerate(processors) if processor.memory is not None]
    if left_out:
        raise UnsupportedPipelineError(
            f"a forward left the self-attention of layers {left_out} out, of which the memory would be stale; take "
            "the cache (TeaCache or the like) or whatever else skips layers off the transformer"
        )


@contextmanager
def installed(processors: Mapping[Any, Any]) -> Iterator[None]:
    """Gives attention modules these processors, and their own back."""
    replaced = {attention: attention.processor for attention in processors}
    try:
        for attention, processor in processors.items():
            attention.set_processor(processor)
        yield
    finally:
        for attention, processor in replaced.items():
            attention.set_processor(processor)
