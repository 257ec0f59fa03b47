"""What cannot be switched on in a transformer beside kvpack's memory, whatever its family."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn

from kvpack.adapters.parallel import check_parallel
from kvpack.errors import UnsupportedPipelineError
from kvpack.generation.compile_boundary import compiled_from
from kvpack.generation.hooks import has_hooks

#: Diffusers' hooks that leave layers out or give their old output; a commit through them would leave stale keys.
_SKIPPING = {
    "faster_cache",
    "first_block_cache",
    "layer_skip",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "taylorseer_cache",
    "text_kv_cache",
}


def check_placement(
    transformer: Any, attentions: Iterable[Any], device: torch.device, head_dim: int, *, shards: bool = False
) -> None:
    """Refuse what would silently give wrong keys, or fail in the middle of a forward.

    Args:
        transformer: the model.
        attentions: its attention modules.
        device: where it is run.
        head_dim: channels of a head.
        shards: whether its adapter follows Ulysses context parallelism.

    Raises:
        UnsupportedPipelineError: naming what is switched on, and how it is switched off.
    """
    transformer = compiled_from(transformer)  # the wrapper's own `type` and `vars` tell nothing
    processors = [attention.processor for attention in attentions]
    _check_caches(transformer)
    check_parallel(transformer, processors, supported=shards)
    if getattr(transformer, "gradient_checkpointing", False):
        raise UnsupportedPipelineError(
            "gradient checkpointing is enabled, which runs layers twice; "
            "call pipe.transformer.disable_gradient_checkpointing() first"
        )
    # Cross-attentions are among them: kvpack's processors there keep the backend that is set.
    for backend in {getattr(each, "_attention_backend", None) for each in processors}:
        check_backend(backend, device, lambda: transformer.dtype, head_dim)


def _check_caches(transformer: Any) -> None:
    if getattr(transformer, "is_cache_enabled", False):
        raise UnsupportedPipelineError(
            f"a CacheMixin cache ({type(transformer._cache_config).__name__}) is enabled, which skips layers of the "
            "commit forward and leaves stale keys; call pipe.transformer.disable_cache() first"
        )
    for path, module in transformer.named_modules() if has_hooks(transformer) else ():
        registry = vars(module).get("_diffusers_hook")
        for name, hook in registry.hooks.items() if registry is not None else ():
            # By module, since one cache is several classes of hooks.
            if type(hook).__module__.rsplit(".", 1)[-1] in _SKIPPING:
                raise UnsupportedPipelineError(
                    f"{type(hook).__name__} is on {path or 'the transformer'}, which skips layers or gives their old "
                    "output and leaves stale keys; take it off with "
                    f"pipe.transformer.get_submodule({path!r})._diffusers_hook.remove_hook({name!r})"
                )
    names = (*vars(transformer), *vars(type(transformer)))  # TeaCache's scripts set theirs on the class
    if _is_patched(type(transformer)) or any("teacache" in name.lower() for name in names):
        raise UnsupportedPipelineError(
            f"{type(transformer).__name__}.forward was replaced, as TeaCache does, which skips layers and leaves stale "
            "keys; use the transformer as diffusers has it"
        )


def _is_patched(cls: type) -> bool:
    """Return whether the class that has `forward` was given one from elsewhere."""
    owner = next(each for each in cls.__mro__ if "forward" in vars(each))  # offloading replaces an instance's alone
    forward = inspect.unwrap(vars(owner)["forward"])  # diffusers itself decorates it, e.g. by apply_lora_scale
    return (forward.__module__, forward.__qualname__) != (owner.__module__, f"{owner.__qualname__}.forward")


def check_backend(backend: Any, device: torch.device, model_dtype: Callable[[], torch.dtype], head_dim: int) -> None:
    """Attend five keys, since diffusers itself finds out in the forward what a backend cannot do.

    Args:
        backend: its name; None is the active one.
        device: where it is to run.
        model_dtype: gives the model's dtype, for which diffusers looks at all of it.
        head_dim: channels of a head.

    Raises:
        UnsupportedPipelineError: if the backend does not run there.
    """
    name = AttentionBackendName(_AttentionBackendRegistry.get_active_backend()[0] if backend is None else backend)
    if name is AttentionBackendName.NATIVE:  # torch's own runs everywhere
        return
    dtype = model_dtype()
    query, keys = (torch.zeros(1, tokens, 1, head_dim, device=device, dtype=dtype) for tokens in (3, 5))
    try:
        with torch.no_grad():
            dispatch_attention_fn(query, keys, keys, backend=name)
    except Exception as error:  # each kernel's package raises what it likes
        raise UnsupportedPipelineError(
            f"the attention backend is {name.value}, which does not run on {device} with {dtype} and heads of "
            f"{head_dim} channels ({type(error).__name__}: {str(error).partition(chr(10))[0]}); "
            'call pipe.transformer.set_attention_backend("native"), or move the pipeline to where it runs'
        ) from error
