"""`check_adapter`: what must hold for every model family, on a tiny pipeline of it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvpack.errors import AdapterError
from kvpack.generation.adapter import Adapter
from kvpack.memory.base import Memory
from kvpack.pipeline.enable import disable, enable
from kvpack.pipeline.enabled import adapter_of

Call = Callable[[int], Mapping[str, Any]]


def check_adapter(
    pipeline: Any,
    call: Call,
    *,
    adapter: Adapter | None = None,
    stack: str | Memory = "packforcing",
    options: Mapping[str, Any] | None = None,
    identity: tuple[Memory, Tensor] | None = None,
    chunks: int = 24,
    tolerance: float = 1e-5,
) -> None:
    """Test an adapter on a pipeline of its family; the whole test of a plugin can be this one line.

    Args:
        pipeline: a small stock pipeline with random weights.
        call: gives the arguments of a call that makes latents of so many chunks; seeded, as new at each call.
        adapter: the adapter; None is the installed one for the pipeline's class.
        stack: memory of the long run.
        options: its options; four mid blocks and an archive of eight for `packforcing`.
        identity: a memory that forgets nothing, and the latents that the stock pipeline makes of `call(3)` in a mode in
            which a chunk attends itself and what is before it; None if the stock pipeline has no such mode.
        chunks: length of the long run.
        tolerance: greatest difference from upstream, as a part of its largest latent.

    Raises:
        AdapterError: if latents differ from upstream's, depend on streaming, or on how long the video is, memory grows
            beyond its archive, or the pipeline is not the stock one again afterwards.
    """
    adapter = adapter or adapter_of(pipeline)
    before, stock = _state(pipeline), _latents(pipeline(**call(3)))
    few = {"topk": 4, "archive_blocks": 8} if stack == "packforcing" else {}
    try:
        if identity is not None:
            enable(pipeline, identity[0], adapter=adapter)
            _check_identity(adapter, _latents(pipeline(**call(3))), identity[1], tolerance)
        enable(pipeline, stack, adapter=adapter, **dict(few if options is None else options))
        _check_streaming(adapter, pipeline, call)
        _check_growth(adapter, pipeline, call, chunks)
        _check_failure(adapter, pipeline, call)
    finally:
        disable(pipeline)
    _check_stock(adapter, before, _state(pipeline))
    if not torch.equal(stock, _latents(pipeline(**call(3)))):
        raise _broken(adapter, "leaves a pipeline that makes other latents than before")


def _check_identity(adapter: Any, given: Tensor, expected: Tensor, tolerance: float) -> None:
    if given.shape != expected.shape:
        raise _broken(adapter, f"makes latents {tuple(given.shape)}, but upstream {tuple(expected.shape)}")
    error = float((given - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:
        raise _broken(adapter, f"differs from upstream by {error:.1e} with a memory that forgets nothing")


def _check_streaming(adapter: Any, pipeline: Any, call: Call) -> None:
    """Check that the same seed gives the same bits, streamed or whole, and that a call can be made twice."""
    whole, again = _latents(pipeline(**call(4))), _latents(pipeline(**call(4)))
    if not torch.equal(whole, again):
        raise _broken(adapter, "is not deterministic: the same call gave other bits")
    streamed = torch.cat(list(pipeline.packforcing.stream(**call(4))), dim=2)
    if not torch.equal(whole, streamed):
        raise _broken(adapter, "streams other latents than a call returns")


def _check_growth(adapter: Any, pipeline: Any, call: Call, chunks: int) -> None:
    """Check that tokens and bytes of the second half of a long run are those of its middle."""
    counts: list[tuple[int, int]] = []
    for latents in pipeline.packforcing.stream(**call(chunks)):
        if not bool(latents.isfinite().all()):
            raise _broken(adapter, f"made latents that are not finite in chunk {len(counts)}")
        stats = pipeline.packforcing.stats()
        counts.append((stats["attended_tokens"], stats["resident_bytes"]))
    tokens, held = zip(*counts[chunks // 2 :], strict=True)
    if len(counts) != chunks or len(set(tokens)) > 1:
        raise _broken(adapter, f"attended {sorted(set(tokens))} tokens in the second half of {len(counts)} chunks")
    if max(held) > held[0]:
        raise _broken(adapter, f"held {held[0]} bytes in the middle of the video and {max(held)} later")


def _check_failure(adapter: Any, pipeline: Any, call: Call) -> None:
    """Check that an error in a chunk goes through, and leaves nothing in the transformer."""
    before, transformer = _modules(pipeline), pipeline.transformer
    # The last module of all need not run; behind it, the transformer is done.
    places = {"first": next(next(transformer.children()).modules()), "last": transformer}

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    for name, module in places.items():
        handle = module.register_forward_hook(fail)
        try:
            pipeline(**call(2))
        except ZeroDivisionError:
            pass
        else:
            raise _broken(adapter, f"did not run the {name} module of the transformer")
        finally:
            handle.remove()
        _check_stock(adapter, before, _modules(pipeline))


def _state(pipeline: Any) -> dict[str, Any]:
    """Return all that enabling or a generation could leave behind."""
    return {"class": type(pipeline), "attributes": "_kvpack" in vars(pipeline), **_modules(pipeline)}


def _modules(pipeline: Any) -> dict[str, Any]:
    transformer = pipeline.transformer
    return {
        "processors": [id(each.processor) for each in transformer.modules() if hasattr(each, "processor")],
        "hooks": [
            (len(each._forward_pre_hooks), len(each._forward_hooks), "forward" in vars(each))
            for each in transformer.modules()
        ],
        "config": dict(transformer.config),
    }


def _check_stock(adapter: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        raise _broken(adapter, f"leaves other {', '.join(changed)} than it found")


def _latents(output: Any) -> Tensor:
    """Return the latents in what a call returns."""
    frames = getattr(output, "frames", output)
    return frames[0] if isinstance(frames, tuple) else frames


def _broken(adapter: Any, what: str) -> AdapterError:
    return AdapterError(f"the adapter {adapter.name} {what}")
