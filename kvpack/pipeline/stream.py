"""A generation that is handed out chunk by chunk, saved and forked between two, and ends with whoever holds it."""

import time
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import torch

from kvpack.errors import BusyPipelineError, SnapshotError, require_bool
from kvpack.generation.branches import Seed, forked, reseed
from kvpack.generation.chunks import own_generators, rewinding
from kvpack.generation.moment import require_between_chunks
from kvpack.generation.prompts import Prompt
from kvpack.generation.run import Run
from kvpack.generation.threads import holder
from kvpack.pipeline.calls import alone, frames
from kvpack.pipeline.progress import OnChunk
from kvpack.snapshots.resuming import resumed
from kvpack.snapshots.saver import Saver

#: Seconds that the end of the interpreter waits for another thread's step.
_PATIENCE = 10.0
#: Seconds between two looks at whether it has ended.
_PAUSE = 0.001


class Stream(Generator[Any, Prompt | None, None]):
    """Frames of a generation, chunk by chunk.

    It is closed by `close`, at the end of a `with` block, when nobody holds it any more, and at the latest when the
    interpreter exits.

    Args:
        pipeline: an enabled pipeline.
        run: its generation.
        on_chunk: called with a `Progress` behind each chunk.
        generation: its name, if it was saved before.
        note: what was saved with it.
        beside: device of a decoder that works while the next chunk is denoised; None decodes in between.
    """

    _run: Run | None = None

    def __init__(
        self,
        pipeline: Any,
        run: Run,
        on_chunk: OnChunk | None = None,
        generation: str | None = None,
        note: Any = None,
        beside: torch.device | None = None,
    ) -> None:
        self._pipeline, self._on_chunk, self._beside = pipeline, on_chunk, beside
        self._generation = generation or uuid4().hex
        self._saver: Saver | None = None
        #: What `save` was given, in a stream that was resumed.
        self.note = note
        self._follow(run)
        # At the exit, before modules are torn down, which closing needs. Until then nothing but its user may hold a
        # stream: what it is made of leads to callbacks and to whoever they belong to, who may hold it himself.
        weakref.finalize(self, _at_exit, weakref.ref(self))

    def __del__(self) -> None:
        self._finish()

    def _follow(self, run: Run) -> None:
        """Hand out the frames of a run from here on."""
        self._run, self._begun = run, False
        self._frames = frames(self._pipeline, run, self._on_chunk, self._beside)
        #: Chunks of the whole video, as far as they can be counted, and those that were there before.
        self.chunks, self.before = run.count, (run.position or (0, 0))[0]

    def __enter__(self) -> "Stream":
        """Return the stream, which the end of the block closes."""
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def send(self, prompt: Prompt | None, *, cut: bool = False) -> Any:
        """Return the next chunk's frames, under another prompt unless it is None.

        The prompt holds at once, and what the stack keeps of the last frames is computed anew with it.

        Args:
            prompt: for this chunk and those behind it: a text, one for each video, or text embeddings; None goes on
                under the prompt in force.
            cut: whether another scene begins.

        Raises:
            InvalidOptionError: if it is not for as many videos as the prompt before, or `cut` neither True nor False.
            BusyPipelineError: if another thread is generating with the pipeline.
            StopIteration: if all frames are there.
        """
        require_bool("cut", cut)
        with alone(self._pipeline):
            ended = self._frames.gi_frame is None  # type: ignore[attr-defined]
            if not ended and (prompt is not None or cut):
                _set_prompt(self._open(), prompt, cut)
            self._begun = True  # before the first chunk: from here on the frames close the run, whatever it raises
            return next(self._frames)

    def save(self, folder: str | Path, note: Any = None) -> None:
        """Write all that the generation remembers into a folder, from which `resume` goes on.

        Between two chunks. The last two snapshots are kept; a write that fails leaves them as they are.

        Args:
            folder: holds the snapshots of this generation and nothing else; made if it is not there.
            note: what JSON takes; `note` of the stream that goes on.

        Raises:
            SnapshotError: if a chunk was interrupted or failed, or something in the call is no data.
            OutputError: if it cannot be written.
            BusyPipelineError: if a chunk is being made.
        """
        with alone(self._pipeline):
            run, saver = self._all_here(), self._saver
            require_between_chunks(run)
            path = Path(folder).resolve()  # the same folder has many names, and a relative one may mean another later
            if saver is None or saver.folder.path != path:
                saver = Saver(path, self._generation, run.denoiser.shard)
            try:
                saver.save(run, note)
            except BaseException:
                if saver is not self._saver:
                    saver.close()
                raise
            if saver is not self._saver:
                self._release()  # the folder of before stays as it is until another one holds a whole snapshot
                self._saver = saver

    def fork(self, *, seed: Seed | None = None, prompt: Prompt | None = None, cut: bool = False) -> Self:
        """Return another future of the same past, which shares its blocks; the two may be drawn from in any order.

        Args:
            seed: of the other one's noise, one for each generator of the call; None draws the same noise in both, if
                the call has a generator.
            prompt: what the other one goes on with, as in `send`.
            cut: whether another scene begins there.

        Raises:
            SnapshotError: if a chunk was interrupted or failed.
            BusyPipelineError: if a chunk is being made.
            InvalidOptionError: if seeds or prompts are not as many as they were.
        """
        with alone(self._pipeline):
            run = forked(self._all_here())
            _turn(run, seed, prompt, cut)
        return type(self)(self._pipeline, run, self._on_chunk)

    def rewind(self, chunks: int, *, seed: Seed | None = None, prompt: Prompt | None = None, cut: bool = False) -> None:
        """Go back to a snapshot that `save` has kept, and forget those behind it.

        Args:
            chunks: how many, back from here.
            seed: of the noise from there on, one for each generator of the call; None draws the same as before, if the
                call has a generator.
            prompt: what it goes on with, as in `send`.
            cut: whether another scene begins there.

        Raises:
            SnapshotError: if no snapshot is kept there, or it is damaged.
            InvalidOptionError: if seeds or prompts are not as many as they were.
        """
        with alone(self._pipeline):
            before = self._open()
            index, _ = before.position or (0, 0)
            behind = {} if self._saver is None else self._saver.folder.chunks()
            if self._saver is None or index - chunks not in behind:
                kept = ", ".join(f"rewind({index - each})" for each in behind) or "none; save() keeps the last two"
                raise SnapshotError(f"no snapshot is kept {chunks} chunks back; those that are: {kept}")
            number, folder = behind[index - chunks], self._saver.folder
            functions = {name: value for name, value in before.call.items() if callable(value)}  # which no file has
            undo = rewinding(own_generators())  # resuming sets torch's own
            try:
                run, _, note = resumed(self._pipeline, folder.path, functions, number)
                _turn(run, seed, prompt, cut)
            except BaseException:
                undo()
                raise
            self.note = note
            # Only now: if the snapshot could not be read, the stream is where it was.
            self._frames.close()
            folder.forget_after(number)  # or a resume would go on from the future that was given up
            self._follow(run)

    def _open(self) -> Run:
        if self._run is None:
            raise SnapshotError("the stream was closed, and holds nothing any more; save or fork it before")
        return self._run

    def _all_here(self) -> Run:
        run = self._open()
        if run.denoiser.guidance is not None:
            raise SnapshotError(
                "each process has the memory of one guidance branch, and no snapshot holds both; set "
                "packforcing.guidance_group to None before the generation to save or fork it"
            )
        if self._beside is not None:
            raise SnapshotError(
                "a stream with decode_device is a chunk ahead of the frames that it has handed out, and cannot be "
                "saved or forked; leave decode_device out"
            )
        return run

    def throw(self, *error: Any) -> Any:
        """End the generation with an error.

        Raises:
            BusyPipelineError: if its next chunk is being made, by another thread or where this is called back from.
        """
        self._require_waiting()
        return self._frames.throw(*error)

    def close(self) -> None:
        """End the generation, and free what it holds.

        Raises:
            BusyPipelineError: if its next chunk is being made, by another thread or where this is called back from.
        """
        self._require_waiting()
        try:
            self._finish()
        finally:
            self._release()

    def _finish(self) -> None:
        run, self._run = self._run, None  # taken first, so that it is closed once
        if run is not None:
            _close(self._frames, run)
            if not self._begun:
                run.close()  # which is the frames' own once one was drawn

    def _require_waiting(self) -> None:
        if self._frames.gi_running:  # type: ignore[attr-defined]
            raise BusyPipelineError(
                "this stream is making a chunk; close it behind that, or set pipe._interrupt = True to end with it"
            )

    def _release(self) -> None:
        if self._saver is not None:
            self._saver.close()
            self._saver = None


def _turn(run: Run, seed: Seed | None, prompt: Prompt | None, cut: bool) -> None:
    """Go on otherwise than before."""
    reseed(run, seed)
    if prompt is not None or cut:
        _set_prompt(run, prompt, cut)


def _set_prompt(run: Run, prompt: Prompt | None, cut: bool) -> None:
    if isinstance(prompt, str | list):  # embeddings need no text encoder
        run.pipeline.maybe_free_model_hooks()  # offloaded models go out, so that the text encoder comes in alone
    run.set_prompt(prompt, cut=cut)


def _at_exit(stream: weakref.ref[Stream]) -> None:
    """Close a stream that somebody holds until the interpreter exits."""
    if (left := stream()) is not None:
        left._finish()


def _close(frames: Generator[Any, None, None], run: Run) -> None:
    """Close frames; another thread that makes one is asked to stop, or the interpreter would abort in its forward."""
    pipeline, thread = run.pipeline, None
    for _ in range(int(_PATIENCE / _PAUSE)):  # counted: a clock may stand still
        try:
            frames.close()
            break
        except ValueError:  # it is running
            thread = thread or holder(getattr(pipeline, "transformer", None))
            pipeline._interrupt = True  # again and again, since the call of a chunk begins with taking it back
            time.sleep(_PAUSE)
    if thread is not None:
        thread.join(_PATIENCE / 5)  # it still lets go of tensors
