"""What an enabled pipeline can do more than a stock one; `enable` gives it this class under its own name."""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from kvpack.errors import InvalidOptionError, OutputError, SnapshotError, UnsupportedPipelineError, plain
from kvpack.generation.adapter import Adapter
from kvpack.generation.hooks import has_hooks
from kvpack.memory.base import Memory
from kvpack.memory.ledger import require_length
from kvpack.memory.session import Session
from kvpack.pipeline.beside import decode_beside
from kvpack.pipeline.calls import Enabled, alone, bound, start, whole
from kvpack.pipeline.progress import OnChunk, require_callback
from kvpack.pipeline.stream import Stream
from kvpack.planning.budget import Choice
from kvpack.plugins.registry import registry
from kvpack.snapshots.resuming import resumed


class PackForcing:
    """The attribute `packforcing` of an enabled pipeline."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    @property
    def stack(self) -> Memory:
        """The memory policy; with a budget, what it chose for the generation that began last."""
        enabled = self._pipeline._kvpack
        return enabled.stack if enabled.choice is None else enabled.choice.memory

    @property
    def choice(self) -> Choice | None:
        """What the budget chose for the generation that began last, line by line as text; None without one."""
        return self._pipeline._kvpack.choice

    @property
    def fps(self) -> float:
        """Pixel frames a second of this model's videos, by which the seconds of a prompt schedule are counted."""
        return self._pipeline._kvpack.fps

    @fps.setter
    def fps(self, fps: float) -> None:
        fps = plain(fps)
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf"):
            raise InvalidOptionError(f"fps must be a number > 0, got {fps!r}")
        self._pipeline._kvpack.fps = float(fps)

    @property
    def writer(self) -> Any:
        """The transformer that commits clean chunks, whose keys and values become history; None is the pipeline's own.

        It may have been trained for that (SGF+, arXiv 2610.10429). It has the size and dtype of the pipeline's own, is
        on its device, and keeps the prompt's keys and values apart. Compressors and replays use it as well.
        """
        return self._pipeline._kvpack.writer

    @writer.setter
    def writer(self, writer: Any) -> None:
        enabled = self._pipeline._kvpack
        enabled.writer = None if writer is None else enabled.adapter.checked_writer(self._pipeline, writer)

    @property
    def guidance_group(self) -> Any:
        """Process group of which each process runs one guidance branch, and has its memory alone; None runs all here.

        All processes make the same calls with the same seeds, and get the same video. It holds from the next generation
        on, which can be neither saved nor forked.
        """
        return self._pipeline._kvpack.guidance_group

    @guidance_group.setter
    def guidance_group(self, group: Any) -> None:
        enabled = self._pipeline._kvpack
        if group is not None and not getattr(enabled.adapter, "shards", False):
            raise UnsupportedPipelineError(
                f"guidance branches of a {type(self._pipeline).__name__} run in one process; WanPipeline splits them"
            )
        if group is not None and not (dist.is_available() and dist.is_initialized()):
            raise InvalidOptionError("guidance_group needs torch.distributed.init_process_group() first")
        if group is not None and dist.get_rank(group) < 0:
            raise InvalidOptionError("guidance_group must be a group that this process belongs to")
        enabled.guidance_group = group

    @property
    def first_chunk_frames(self) -> int | None:
        """Latent frames of a video's first chunk, e.g. 1 for an independent first frame.

        None leaves it to the model: as its config says (AnyFlow-FAR), or as many as any.
        """
        return self._pipeline._kvpack.first_chunk_frames

    @first_chunk_frames.setter
    def first_chunk_frames(self, frames: int | None) -> None:
        frames = plain(frames)
        if frames is not None:
            require_length(frames, self.stack.chunk_frames, "first_chunk_frames: a chunk")
        self._pipeline._kvpack.first_chunk_frames = frames

    @property
    def sessions(self) -> dict[str, Session]:
        """Sessions of the generation in progress by guidance branch; empty when none is."""
        run = self._pipeline._kvpack.run
        return {} if run is None else run.sessions

    def stats(self) -> dict[str, Any]:
        """Return tokens and bytes by partition, selections and seconds of the generation in progress, or the last."""
        enabled = self._pipeline._kvpack
        return enabled.last if (run := enabled.run) is None else run.denoiser.stats()

    def __repr__(self) -> str:
        return f"<packforcing of {type(self._pipeline).__name__}: {self._pipeline._kvpack}>"

    def trace(self, path: str | os.PathLike[str] | None) -> None:
        """Let the generations to come write what their memory does into a file, which `kvpack report` draws.

        Each generation begins the file anew, one that is forked, rewound or resumed too, and adds a line of JSON behind
        every chunk (see `kvpack.pipeline.trace`). It is that of the generation that began last.

        Args:
            path: the file; None writes none any more.

        Raises:
            OutputError: if its directory is not there.
        """
        if path is not None and not Path(path).parent.is_dir():
            raise OutputError(f"cannot write the trace {path}: {Path(path).parent} is no directory; make it first")
        self._pipeline._kvpack.trace = None if path is None else Path(path)

    def stream(
        self,
        *args: Any,
        on_chunk: OnChunk | None = None,
        decode_device: str | torch.device | None = None,
        on_nan: str = "raise",
        **kwargs: Any,
    ) -> Stream:
        """Generate without end, or `num_frames`, and yields each chunk's frames as soon as they are decoded.

        Takes the arguments of the pipeline's call. Between two chunks the pipeline is the stock one, and memory does
        not grow but for the archive of compressed blocks (see `archive_blocks`).

        Args:
            args: of the pipeline's call.
            on_chunk: called with a `Progress` behind each chunk, as the pipeline's own call does with its `on_chunk`.
            decode_device: where a chunk's frames are decoded, by a thread and a VAE of their own, while the next chunk
                is denoised. The same frames come a chunk later, and a prompt that is sent holds from the chunk behind
                that one on; such a stream cannot be saved or forked. None decodes before the next chunk.
            on_nan: "retry" makes a chunk that holds NaN or infinity again of other noise, three times at most, instead
                of ending the generation with `NonFiniteLatentsError`; the pipeline's own call takes it too.
            kwargs: of the pipeline's call.

        Returns:
            An iterator over frames in the call's `output_type`, batch first: `[batch, frames, height, width, 3]` for
            "np". Its `send(prompt)` goes on under another prompt, and `with` ends it with the block.
        """
        arguments = bound(self._pipeline, args, kwargs, num_frames=None)
        require_callback(on_chunk)
        with alone(self._pipeline):
            run = start(self._pipeline, arguments, streaming=True, on_nan=on_nan)
            beside = None if decode_device is None else decode_beside(run, decode_device)
            return Stream(self._pipeline, run, on_chunk, beside=beside)

    def resume(self, folder: str | Path, on_chunk: OnChunk | None = None, **given: Any) -> "Stream":
        """Go on with the generation that was saved in a folder, bit for bit as if it had never been stopped.

        The pipeline is enabled with the same stack, whose archive may be on another tier, and has the same weights,
        LoRA adapters and scheduler. A damaged snapshot is passed over for the one before it, with a `SnapshotWarning`.
        Where noise was drawn from torch's own generators, they are set to where they were.

        Args:
            folder: what `Stream.save` was given.
            on_chunk: as of `stream`.
            given: arguments of the call that are functions, such as `callback_on_step_end`, which no file has.

        Raises:
            SnapshotError: if no snapshot in the folder can be read, or it is that of another model, stack or geometry.
            InvalidOptionError: if functions are not given again, or others are given.
        """
        require_callback(on_chunk)
        if self.guidance_group is not None:
            raise SnapshotError("a snapshot has all guidance branches; set packforcing.guidance_group to None first")
        with alone(self._pipeline):
            run, generation, note = resumed(self._pipeline, Path(folder), given)
            return Stream(self._pipeline, run, on_chunk, generation, note)


class PackForcingMixin:
    """Generates chunk by chunk through the pipeline's own call."""

    _kvpack_base: type[DiffusionPipeline]

    @property
    def packforcing(self) -> PackForcing:
        """Streaming, stats and the stack of this pipeline."""
        if "_kvpack" not in self.__dict__:  # made by from_pipe of the enabled class
            raise UnsupportedPipelineError("this pipeline has no memory stack yet; call enable_packforcing() first")
        return PackForcing(self)

    def maybe_free_model_hooks(self) -> None:
        """Free the models, but not between the chunks of a generation, where weights must stay."""
        enabled = self.__dict__.get("_kvpack")
        if enabled is None or enabled.driving is None:
            self._kvpack_base.maybe_free_model_hooks(self)  # type: ignore[arg-type]

    @property
    def _execution_device(self) -> Any:
        """Return the stock device, which a chunk asks for once; where no hook says it, it is where the weights are."""
        enabled, stock = self.__dict__.get("_kvpack"), cast(Any, self._kvpack_base._execution_device)
        if enabled is None or enabled.driving is None:
            return stock.fget(self)
        if enabled.device is None:
            components = sorted(cast(DiffusionPipeline, self).components.items())  # as `device` goes through them
            models = [each for _, each in components if isinstance(each, torch.nn.Module)]
            enabled.device = stock.fget(self) if any(map(has_hooks, models)) else _device_of(models)
        return enabled.device

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """Return the stock bar, or in a generation what moves the one bar of the whole video."""
        enabled = self.__dict__.get("_kvpack")
        if enabled is None or enabled.driving is None:
            return self._kvpack_base.progress_bar(self, iterable, total)  # type: ignore[arg-type]
        return nullcontext(enabled.driving)  # the call enters it, and then calls its `update`

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the stock class, enabled again on arrival."""
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, state, *rest = reduced
        state = dict(state)
        enabled = state.pop("_kvpack", None)  # a copy takes no generation along
        kept = None if enabled is None else enabled.as_kwargs()
        return (_rebuild, (self._kvpack_base, kept), state, *rest)


def _device_of(models: Iterable[torch.nn.Module]) -> torch.device:
    """Return what `DiffusionPipeline.device` does of models sorted by name, without its two walks over all modules."""
    devices = [parameter.device for each in models for parameter in islice(each.parameters(), 1)]
    return max(devices, key=lambda device: device.type not in ("cpu", "meta"), default=torch.device("cpu"))


def enabled_class(base: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """Return a subclass of `base` that cannot be told from it by name: saving and reloading give the stock pipeline."""

    @wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "_kvpack" not in self.__dict__:
            return base.__call__(self, *args, **kwargs)
        on_chunk = require_callback(kwargs.pop("on_chunk", None))  # taken out: the stock call has no such argument
        on_nan = kwargs.pop("on_nan", "raise")
        with alone(self):
            return whole(self, start(self, bound(self, args, kwargs), streaming=False, on_nan=on_nan), on_chunk)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (PackForcingMixin, base), {**names, "__call__": call, "_kvpack_base": base})


def _rebuild(base: type[DiffusionPipeline], kept: dict[str, Any] | None) -> Any:
    pipeline: Any = object.__new__(enabled_class(base))  # its state is set by whoever unpickles
    if kept is not None:
        attach(pipeline, **kept)
    return pipeline


def attach(pipeline: Any, stack: Memory, adapter: Adapter, **settings: Any) -> None:
    """Put the stack on a pipeline whose class is already the enabled one, and further fields of `Enabled`."""
    # Past DiffusionPipeline.__setattr__, which looks into the pipeline's config.
    object.__setattr__(pipeline, "_kvpack", Enabled(stack, adapter, **settings))


def adapter_of(pipeline: Any) -> Adapter:
    """Return the installed adapter that drives a pipeline.

    Raises:
        UnsupportedPipelineError: if there is none.
    """
    adapter = registry().adapter(type(pipeline))
    if adapter is None:
        model = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None) or pipeline
        raise UnsupportedPipelineError(
            f"kvpack has no adapter for {type(model).__name__} in {type(pipeline).__name__}. "
            f"Installed: {', '.join(registry().names('adapter'))}. See docs/extend/adapter.md"
        )
    return adapter
