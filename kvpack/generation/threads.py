"""Who may generate: an enabled pipeline, in one thread at a time, since its processors are one generation's."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread, get_ident
from typing import Any

from kvpack.errors import BusyPipelineError, UnsupportedPipelineError
from kvpack.generation.compile_boundary import compiled_from

_HOLDER = "_kvpack_thread"


@dataclass(eq=False)
class _Holder:
    """Who is in a transformer.

    Args:
        thread: its identity.
        model: identity of the transformer, which a copy made meanwhile has another one of.
        drives: whether a chunk is being made.
    """

    thread: int
    model: int
    drives: bool = False


@contextmanager
def one_thread(transformer: Any, *, drives: bool = False) -> Iterator[None]:
    """Keep other threads out of a transformer for the length of a block; the same thread may come in again.

    Pipelines that share a transformer share this too. Nothing waits: a video takes minutes.

    Args:
        transformer: the model, as it is or compiled; None is left to who says that it is missing.
        drives: whether its processors are one generation's in the block; then the same thread may not come in again.

    Raises:
        BusyPipelineError: if another thread is in it, or the same one makes a chunk with it.
    """
    model = compiled_from(transformer)
    if model is None:
        yield
        return
    mine = _Holder(get_ident(), id(model))  # in the model itself, which pipelines may share
    try:
        found = vars(model).setdefault(_HOLDER, mine)  # one step, that no other thread comes between
        if found.model != id(model):  # came along with a copy that was made inside such a block
            found = vars(model)[_HOLDER] = mine
        require_thread(found.thread)
        # A second chunk inside a chunk would take the first one's processors for the stock ones.
        if found.drives:
            raise BusyPipelineError(
                "a chunk is being made with this pipeline, or with one that shares its transformer, and this was "
                "called back from inside of it; wait for its end, e.g. in on_chunk, or make another pipeline"
            )
        try:
            found.drives = drives  # of who came first: who comes in again shares its holder
            yield
        finally:
            found.drives = False
    finally:
        if vars(model).get(_HOLDER) is mine:  # who came in again leaves it to who came first
            del vars(model)[_HOLDER]


def holder(transformer: Any) -> Thread | None:
    """Return the thread that is in a transformer; None if none is."""
    model = compiled_from(transformer)
    found = None if model is None else vars(model).get(_HOLDER)
    return next((each for each in threading.enumerate() if found is not None and each.ident == found.thread), None)


def require_thread(thread: int) -> None:
    """Raise `BusyPipelineError` in any thread but this one.

    >>> require_thread(get_ident())
    """
    if thread != get_ident():
        raise BusyPipelineError(
            "another thread is generating with this pipeline, or with one that shares its transformer; one thread at a "
            "time: make a pipeline of its own for each thread"
        )


def require_enabled(pipeline: Any) -> Any:
    """Return what `enable` has left on a pipeline.

    Raises:
        UnsupportedPipelineError: if that is not there any more.
    """
    enabled = vars(pipeline).get("_kvpack")
    if enabled is None:
        raise UnsupportedPipelineError(
            "packforcing was disabled while a stream was open; enable it again, and begin another stream"
        )
    return enabled
