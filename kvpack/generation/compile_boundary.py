"""An operator that `torch.compile` does not trace: memory is Python that changes by chunk.

Compiled code holds a number for each layer, as a tensor, so that neither layers nor chunks compile anew.
"""

import sys
from abc import ABC, abstractmethod
from itertools import count
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvpack.errors import BusyPipelineError

_numbers = count()  # never one twice: compiled code may still hold an old one
# Holds none: processors go with their chunk.
_alive: "WeakValueDictionary[int, OpaqueAttention]" = WeakValueDictionary()


def compiled_from(model: Any) -> Any:
    """Return the model that `torch.compile(model)` wraps; a model that is not wrapped as it is."""
    return getattr(model, "_orig_mod", model)


def has_compiled_parts(model: torch.nn.Module) -> bool:
    """Return whether a part of a model is compiled, such as its blocks."""
    # By `module.compile()`, as compile_repeated_blocks does, or by `torch.compile(module)`.
    return any(each._compiled_call_impl is not None or "_orig_mod" in each._modules for each in model.modules())


def graphs_replay() -> bool:
    """Return whether CUDA graphs may have been recorded: whether the part of torch that does it is loaded."""
    # Looked up and not imported: who compiles nothing loads nothing for CUDA graphs.
    return "torch._inductor.cudagraph_trees" in sys.modules and torch.cuda.is_initialized()


def begin_forward(in_parts: bool) -> None:
    """Tell CUDA graphs that another forward of the model begins, so that its blocks may pass tensors to each other.

    Without it each call of a compiled block may write over what the one before put out.

    Args:
        in_parts: whether parts of the model are compiled, and may be about to record their first graphs.
    """
    if graphs_replay() or (in_parts and torch.cuda.is_initialized()):
        torch.compiler.cudagraph_mark_step_begin()


def end_forward(output: Any) -> Any:
    """Return what a model put out such that the next forward, of another branch say, does not write over it."""
    if graphs_replay() and isinstance(output, tuple):
        return tuple(each.clone() if isinstance(each, Tensor) else each for each in output)
    return output


class OpaqueAttention(ABC):
    """Attention that compiled code reaches by a number; freed with its last reference."""

    #: Whether tensors that it is given may be needed after the call.
    keeps: ClassVar[bool] = True

    def __init__(self) -> None:
        number = next(_numbers)
        #: The number, as a tensor: compiled code looks at a tensor's shape, but at a number's value.
        self.number = torch.tensor(number, device="cpu")
        _alive[number] = self

    def __deepcopy__(self, memo: Any) -> Any:
        """Refuse copies, of whatever model it is in: they would attend this generation's memory for good."""
        raise BusyPipelineError(
            "a transformer cannot be copied while a chunk is made with it, since kvpack's processors are in it; copy "
            "it between two chunks, e.g. in on_chunk"
        )

    @abstractmethod
    def attended(self, queries: Tensor, others: list[Tensor]) -> Tensor:
        """Return a new tensor in the shape of the queries."""


def attend(attention: OpaqueAttention, queries: Tensor, others: list[Tensor]) -> Tensor:
    """Return `attention.attended(queries, others)`; a compiler sees one opaque operator."""
    if not torch.compiler.is_compiling():
        return attention.attended(queries, others)
    if torch.is_grad_enabled():
        return _outside(attention, queries, others)  # the operator has no backward
    return _attend(queries, others, attention.number)


# Gradients pass through the memory's own operations, at the price of a break in the graph.
@torch.compiler.disable()  # type: ignore[untyped-decorator]
def _outside(attention: OpaqueAttention, queries: Tensor, others: list[Tensor]) -> Tensor:
    return attention.attended(queries, others)


# Recent versions of torch can be told that a CUDA graph must not replay it.
_unsafe: Any = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


# Written out, since torch 2.6 does not read it from `list[Tensor]`.
_SCHEMA = "(Tensor queries, Tensor[] others, Tensor(a!) number) -> Tensor"


# The number stands for a memory that is written: that it is "mutated" keeps calls in order, and each of them alive.
@torch.library.custom_op("kvpack::attend", mutates_args={"number"}, schema=_SCHEMA, **_unsafe)
def _attend(queries: Tensor, others: list[Tensor], number: Tensor) -> Tensor:
    attention = _alive[int(number)]
    if attention.keeps:  # compiled code writes over tensors that it has no more use for
        queries, others = queries.clone(), [each.clone() for each in others]
    return attention.attended(queries, others).to(queries.dtype).contiguous()  # as the fake one below promises


@_attend.register_fake
def _(queries: Tensor, others: list[Tensor], number: Tensor) -> Tensor:
    return queries.new_empty(queries.shape)
