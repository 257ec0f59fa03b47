"""Diffusers' context parallelism beside kvpack's memory: tokens are split outside of attention, heads inside."""

from typing import Any

from torch import Tensor

from kvpack.errors import UnsupportedPipelineError
from kvpack.generation.compile_boundary import compiled_from
from kvpack.memory.layer import AttendingLayer, ForwardLayer
from kvpack.memory.shard import Shard


def shard_of(transformer: Any) -> Shard | None:
    """Return this process's part of a transformer on which `enable_parallelism` was called; None if it was not."""
    config = getattr(compiled_from(transformer), "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    if context is None:
        return None
    rank, group = context._ulysses_local_rank, context._ulysses_mesh.get_group()  # enable_parallelism() has made both
    return Shard(context.ulysses_degree, rank, group, context._device)


def check_parallel(transformer: Any, processors: list[Any], *, supported: bool) -> None:
    """Refuse parallelism that kvpack cannot follow.

    Args:
        transformer: the model.
        processors: those of its attention modules.
        supported: whether its adapter follows Ulysses context parallelism.

    Raises:
        UnsupportedPipelineError: naming what is switched on.
    """
    config = getattr(transformer, "_parallel_config", None)
    if config is None and all(getattr(each, "_parallel_config", None) is None for each in processors):
        return
    context = getattr(config, "context_parallel_config", None)
    if context is None or not supported:
        raise UnsupportedPipelineError(
            "context parallelism or tensor parallelism is enabled, under which a rank sees a part of the tokens or "
            "heads only; load the pipeline without enable_parallelism() and parallel_config"
            + (", or with ContextParallelConfig(ulysses_degree=...)" if supported else "")
        )
    if context.ring_degree > 1:
        raise UnsupportedPipelineError(
            f"ring attention over {context.ring_degree} ranks is enabled, in which keys travel and no rank can keep "
            f"them; give ContextParallelConfig(ulysses_degree={context.ring_degree}) alone"
        )
    heads = transformer.config.num_attention_heads
    if heads % context.ulysses_degree:
        raise UnsupportedPipelineError(
            f"ulysses_degree {context.ulysses_degree} does not divide the model's {heads} heads, of which each rank "
            "holds as many; give a degree that does"
        )


def attended_by_heads(
    shard: Shard, layer: AttendingLayer, queries: Tensor, keys: Tensor, values: Tensor, attention: Any
) -> Tensor:
    """Return a layer's attention of this rank's tokens, of which each rank attends its heads.

    Args:
        shard: this rank.
        layer: its memory, which holds its heads.
        queries: of its tokens and all heads, `[rows, share, heads, head_dim]`.
        keys: likewise.
        values: likewise.
        attention: as of `AttendingLayer.attend`.
    """
    assert isinstance(layer, ForwardLayer)
    # `tokens` cuts off what fills the ranks' shares: zeros would be attended.
    mine = [shard.to_heads(each, layer.forward.tokens) for each in (queries, keys, values)]
    return shard.to_tokens(layer.attend(mine[0], mine[1], mine[2], attention))
