"""The seam in a Wan transformer: its self-attention, its prompt's keys and values, and the branch of each forward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from diffusers.hooks.hooks import BaseState, CacheContext, HookRegistry, ModelHook, StateManager
from torch import Tensor

from kvpack.adapters import attention
from kvpack.adapters.wan.prompt_cache import PromptedLayers
from kvpack.generation.compile_boundary import compiled_from
from kvpack.memory.layer import AttendingLayer
from kvpack.memory.shard import Shard

_HOOK_NAME = "kvpack_branch"
Guided = Callable[[str, Callable[[], Any], Tensor], Any]


@contextmanager
def attached(
    transformer: Any,
    layers_for: Callable[[str, int | None], Sequence[AttendingLayer]],
    prompted: PromptedLayers,
    shard: Shard | None = None,
    guided: Guided | None = None,
) -> Iterator[None]:
    """Run the transformer's self-attention over kvpack's memory, and leave a stock transformer behind.

    Args:
        transformer: a `WanTransformer3DModel`.
        layers_for: called before every forward with the pipeline's branch and step; returns the memory of each layer.
        prompted: cross-attentions whose prompt is computed once.
        shard: the process, where several hold a layer's heads.
        guided: called in the place of every forward with its branch, the forward and the given latents.
    """
    transformer = compiled_from(transformer)

    def before_forward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[AttendingLayer]:
        branch = context()  # bound below, before any forward
        # The third argument of the transformer's forward, where somebody passes it by place.
        prompted.before_forward(branch.name, kwargs["encoder_hidden_states"] if len(args) < 3 else args[2])
        return layers_for(branch.name, branch.step_index)

    attentions = [block.attn1 for block in transformer.blocks]
    with (
        attention.attached(transformer, attentions, before_forward, others=prompted.processors, shard=shard),
        _branch_hook(transformer, guided) as context,
    ):
        yield


class _BranchHook(ModelHook):
    """Knows which guidance branch and step the pipeline is in, as `cache_context` says."""

    _is_stateful = True  # `cache_context` looks for a StateManager in hooks that say so, and for nothing else

    def __init__(self) -> None:
        super().__init__()
        self.manager = StateManager(BaseState)  # type: ignore[arg-type]  # of which none is made

    def reset_state(self, module: Any) -> Any:
        """Forget the branch."""
        self.manager.reset()
        return module


class _GuidedHook(_BranchHook):
    """Lets a forward be that of another process."""

    def __init__(self, guided: Guided) -> None:
        super().__init__()
        self.guided = guided

    # Diffusers asks whether a hook has this method, hence a class of its own.
    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what `guided` does."""
        # Of which the prediction of another process has the shape.
        given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        forward = cast(Callable[..., Any], self.fn_ref.original_forward)
        return self.guided(self.manager.context.name, partial(forward, *args, **kwargs), given)


@contextmanager
def _branch_hook(transformer: Any, guided: Guided | None) -> Iterator[Callable[[], CacheContext]]:
    """Give what returns the branch and step of the forward in progress."""
    branch = _BranchHook() if guided is None else _GuidedHook(guided)
    had_forward = "forward" in vars(transformer)  # e.g. accelerate's, which stays
    hooks = HookRegistry.check_if_exists_or_initialize(transformer)
    hooks.register_hook(branch, _HOOK_NAME)
    try:
        yield lambda: branch.manager.context
    finally:
        hooks.remove_hook(_HOOK_NAME, recurse=False)
        if not had_forward:
            # Diffusers' remove_hook() puts the class's own on the instance, where no stock model has one.
            vars(transformer).pop("forward", None)
