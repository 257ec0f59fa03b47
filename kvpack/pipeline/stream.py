"""A generation that is handed out chunk by chunk, and that ends with whoever holds it."""

import weakref
from collections.abc import Generator
from typing import Any

from kvpack.generation.prompts import Prompt
from kvpack.generation.run import Run
from kvpack.pipeline.calls import alone
from kvpack.pipeline.saved import SavedStream


class Stream(SavedStream, Generator[Any, Prompt | None, None]):
    """Frames of a generation, chunk by chunk.

    It is closed by `close`, at the end of a `with` block, when nobody holds it any more, and at the latest when the
    interpreter exits.

    Args:
        pipeline: an enabled pipeline.
        run: its generation.
        on_chunk: called with a `Progress` behind each chunk.
        generation: its name, if it was saved before.
        note: what was saved with it.
    """

    _end: Any = None

    def _follow(self, run: Run) -> None:
        super()._follow(run)
        if self._end is not None:
            self._end.detach()
        # Before modules are torn down, which closing needs; a generator that is left to the interpreter comes after.
        self._end = weakref.finalize(self, _close, self._frames)
        #: Chunks of the whole video, as far as they can be counted.
        self.chunks = run.count

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
            InvalidOptionError: if it is not for as many videos as the prompt before.
            BusyPipelineError: if another thread is generating with the pipeline.
            StopIteration: if all frames are there.
        """
        with alone(self._pipeline):
            ended = self._frames.gi_frame is None  # type: ignore[attr-defined]
            if not ended and (prompt is not None or cut):
                self._run.set_prompt(prompt, cut=cut)
            return next(self._frames)

    def throw(self, *error: Any) -> Any:
        """End the generation with an error."""
        return self._frames.throw(*error)

    def close(self) -> None:
        """End the generation."""
        self._frames.close()
        self._release()


def _close(frames: Generator[Any, None, None]) -> None:
    """Close what is not running in another thread, which goes on to its end or dies with the interpreter."""
    if not frames.gi_running:  # type: ignore[attr-defined]
        frames.close()
