"""One call of an enabled pipeline: its arguments bound, its chunks collected or handed out."""

import weakref
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpack.errors import InvalidOptionError, plain, require_choice
from kvpack.generation.adapter import Adapter, call_signature
from kvpack.generation.chunks import require_generators
from kvpack.generation.run import Run
from kvpack.generation.threads import one_thread, require_enabled
from kvpack.logging import get_logger
from kvpack.memory.base import Memory
from kvpack.pipeline.beside import decoded_beside
from kvpack.pipeline.progress import OnChunk, reported
from kvpack.pipeline.trace import traced
from kvpack.planning.budget import Budget, Choice

logger = get_logger(__name__)


@dataclass
class Enabled:
    """What `enable` leaves on a pipeline.

    Args:
        stack: the memory policy.
        adapter: drives the pipeline.
        driving: the generation in progress, while the upstream call runs inside it.
        device: where that runs, once somebody has asked.
        last: stats of the last generation.
        fps: pixel frames a second, which say at what chunk a prompt schedule's seconds are.
        first_chunk_frames: latent frames of a video's first chunk; None leaves it to the model.
        call: arguments of the pipeline's call that are the model's own, where a call does not give them.
        trace: file that generations write what their memory does to; copies do not take it along.
        writer: the transformer that commits clean chunks; None is the pipeline's own. Copies do not take it along.
        guidance_group: processes that run a guidance branch each; None runs all here. Copies do not take it along.
        budget: what the memory of a generation may hold; None is as much as the stack says.
        choice: what the budget chose for the generation that began last.
    """

    stack: Memory
    adapter: Adapter
    driving: Run | None = None
    device: torch.device | None = None
    last: dict[str, Any] = field(default_factory=dict)
    fps: float = 16.0
    first_chunk_frames: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    trace: Path | None = None
    writer: Any = None
    guidance_group: Any = None
    budget: Budget | None = None
    choice: Choice | None = None
    _run: weakref.ref[Run] | None = field(default=None, init=False, repr=False)

    @property
    def run(self) -> Run | None:
        """The generation in progress, held by its frames alone: a callback of it may belong to who holds these."""
        return None if self._run is None else self._run()

    @run.setter
    def run(self, run: Run | None) -> None:
        self._run = None if run is None else weakref.ref(run)

    def __str__(self) -> str:
        if (run := self.run) is not None:
            stats, of = run.denoiser.stats(), "" if run.count is None else f" of {run.count}"
            held = f"{stats.get('resident_bytes', 0) / 1e6:.4g} MB held"
            state = f"{stats['chunks']} chunks{of} are committed, {held}"
        else:
            state = f"the last generation had {self.last['chunks']} chunks" if self.last else "nothing generated yet"
        most = "" if self.budget is None else f", at most {self.budget.gigabytes:g} GB"
        return f"{self.stack.name}{most}, chunks of {self.stack.chunk_frames} latent frames, {self.fps:g} fps; {state}"

    def choice_for(self, run: Run, conditioning: Mapping[str, Any]) -> Choice | None:
        """Return what the budget chooses for a generation that is about to begin or go on; None without a budget.

        Args:
            run: the generation.
            conditioning: what the transformer is told, by guidance branch, a row for each video.
        """
        if self.budget is None:
            return None
        choice = self.budget.for_run(run, conditioning)
        for line in str(choice).splitlines():
            logger.info(line)
        return choice

    def as_kwargs(self) -> dict[str, Any]:
        """Return what copies take along: all but generations."""
        taken = ("stack", "adapter", "fps", "first_chunk_frames", "call", "budget")
        return {name: getattr(self, name) for name in taken}


def bound(pipeline: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **otherwise: Any) -> dict[str, Any]:
    """Return all arguments of the pipeline's own call, and of the adapter's, by name; `otherwise` where not given."""
    extra = pipeline._kvpack.adapter.extra_arguments
    own = {name: value for name, value in kwargs.items() if name not in extra}  # what the stock call would not take
    bound = call_signature(pipeline._kvpack_base).bind(*args, **own)
    # Before the defaults are there: the model's own settings go before those, but not before what is given.
    given = {**bound.arguments, **{name: kwargs.get(name, default) for name, default in extra.items()}}
    bound.apply_defaults()
    settings = {**pipeline._kvpack.call, **otherwise}
    settings = {name: value for name, value in settings.items() if name in bound.arguments}
    # The last one wins.
    arguments = {**bound.arguments, **settings, **given}
    return {name: plain(value) for name, value in arguments.items()}


def start(pipeline: Any, arguments: dict[str, Any], *, streaming: bool, on_nan: str = "raise") -> Run:
    """Start a generation with these arguments, and with a memory that the budget holds.

    Raises:
        InvalidOptionError: if an argument cannot work, no memory of the stack fits the budget, or `on_nan` is neither
            "raise" nor "retry".
    """
    require_generators(arguments.get("generator"))
    require_choice("on_nan", on_nan, ("raise", "retry"))
    if on_nan == "retry" and arguments.get("latents") is not None:
        raise InvalidOptionError('on_nan="retry" draws other noise, but latents are given; leave one of them out')
    enabled = pipeline._kvpack
    try:
        run: Run = enabled.adapter.run(pipeline, enabled.stack, arguments, streaming=streaming)
        # Behind the run, which knows the frames, branches and rows that the budget is for.
        choice = enabled.choice_for(run, run.denoiser.conditioning)
        if choice is not None and choice.memory is not run.stack:
            run.stack = choice.memory
            run.denoiser = run.new_denoiser(run.denoiser.geometry, run.denoiser.conditioning)
    except BaseException:
        pipeline.maybe_free_model_hooks()  # offloading may have brought the text encoder
        raise
    run.retries_nan, enabled.choice = on_nan == "retry", choice
    return run


@contextmanager
def alone(pipeline: Any) -> Iterator[None]:
    """Keep other threads out of the pipeline's transformer, and `torch.inference_mode` away, for the length of a block.

    Raises:
        UnsupportedPipelineError: if the pipeline is not enabled any more.
        BusyPipelineError: if another thread is in it.
    """
    require_enabled(pipeline)
    gradients = torch.is_grad_enabled()  # which switching that mode off would switch on
    with (
        one_thread(getattr(pipeline, "transformer", None)),
        # What is made in that mode can be written in it alone, and each chunk writes into the memory of those before.
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
    ):
        yield


@contextmanager
def running(pipeline: Any, run: Run) -> Iterator[Enabled]:
    """Make a run the pipeline's generation in progress; at the end free what it holds and keep its stats."""
    enabled = pipeline._kvpack
    enabled.run = run
    try:
        yield enabled
    finally:
        if enabled.run is run:  # another stream may have begun meanwhile
            enabled.run = None
        run.close()
        enabled.last = run.denoiser.stats()


def frames(
    pipeline: Any, run: Run, on_chunk: OnChunk | None = None, beside: torch.device | None = None
) -> Generator[Any, None, None]:
    """Yield each chunk's frames in the call's `output_type`; they are decoded on a device `beside`, if one is given."""
    with running(pipeline, run) as enabled:
        chunks = reported(traced(run, enabled.trace), run, on_chunk)
        for chunk in chunks if beside is None else decoded_beside(chunks, run, beside):
            made = chunk.latents if chunk.pixels is None else run.postprocess(chunk.pixels)
            run.between_chunks = not run.interrupted  # what nobody was given must be made again after a save
            yield made
            enabled.run = run  # another stream may have been drawn from meanwhile


def whole(pipeline: Any, run: Run, on_chunk: OnChunk | None = None) -> Any:
    """Return what the pipeline's call returns, all chunks in it."""
    latents, frames = [], []
    with running(pipeline, run):
        for chunk in reported(traced(run, pipeline._kvpack.trace), run, on_chunk):
            latents.append(chunk.latents)
            if chunk.pixels is not None:
                frames.append(run.postprocess(chunk.pixels))
        if run.output_type == "latent":
            return run.output(torch.cat(latents, dim=2))
        # Decoded after the loop, when the transformer is done, unless the compressor needed the pixels anyway.
        frames = frames or [run.postprocess(each) for each in run.decoded(latents)]
        return run.output(_joined(frames, run.output_type))


def _joined(parts: list[Any], output_type: str) -> Any:
    if output_type == "pt":
        return torch.cat(parts, dim=1)
    if output_type == "np":
        return np.concatenate(parts, axis=1)
    # PIL: a list of frames for each video.
    return [list(chain.from_iterable(videos)) for videos in zip(*parts, strict=True)]
