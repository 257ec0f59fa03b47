"""All that a generation remembers between two chunks, as data, and the generation that goes on from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvpack.errors import SnapshotError
from kvpack.generation.chunks import own_generators
from kvpack.generation.replay import CleanFrames
from kvpack.generation.run import Run
from kvpack.memory.base import Memory
from kvpack.memory.session import Past, Session

if TYPE_CHECKING:
    from kvpack.generation.adapter import Adapter

#: What a run has of the pipeline, or is made of the rest.
_NO_DATA = {"adapter", "pipeline", "stack", "denoiser", "_decode", "_bar", "watch"}


@dataclass(frozen=True, eq=False)
class Moment:
    """A generation between two chunks.

    Args:
        run: attributes of the `Run` that are data, the call's arguments among them.
        conditioning: what the transformer is told of the prompt now, by guidance branch.
        pasts: what each guidance branch remembers.
        clean: the last clean latents, for a replay.
        decoder: what the streaming decoder remembers; None where there is none.
        own_generators: states of torch's own generators, if anything was drawn from them.
    """

    run: dict[str, Any]
    conditioning: dict[str, Any]
    pasts: dict[str, Past]
    clean: CleanFrames
    decoder: dict[str, Any] | None
    own_generators: tuple[Tensor, ...]


def require_between_chunks(run: Run) -> None:
    """Raise `SnapshotError` if a generation was interrupted or failed in the middle of a chunk."""
    if not run.between_chunks:
        raise SnapshotError(
            "a generation can be saved or forked between two chunks only, but this one was interrupted or failed in "
            "one; go on from the snapshot before it"
        )


def captured(run: Run, *, apart: bool) -> Moment:
    """Return where a generation is.

    Args:
        run: the generation.
        apart: whether what becomes of it must not change the moment; otherwise it holds until the next chunk.

    Raises:
        SnapshotError: if it is in the middle of a chunk, or was interrupted or failed in one, or its family's decoder
            cannot say what it remembers.
    """
    require_between_chunks(run)
    if run._decode is not None and not hasattr(run._decode, "state"):
        name = type(run._decode).__name__
        raise SnapshotError(f'{name} has no state() and restore(); stream with output_type="latent" to save or fork')
    # Made anew when asked for.
    cached = {name for name in vars(run) if isinstance(getattr(type(run), name, None), cached_property)}
    own = {name: value for name, value in vars(run).items() if name not in _NO_DATA | cached}
    call = {name: None if name in run.spent else value for name, value in run.call.items()}
    denoiser, sessions = run.denoiser, run.sessions
    # Before the first chunk nobody knows yet whether it will draw from torch's own generators.
    given = run.call.get("generator") is not None or run.call.get("latents") is not None
    generators = own_generators() if run.draws_freely or (run.position is None and not given) else []
    pasts = {
        # `state` forks blocks, so that they stay.
        name: each.state() if apart else Past(each.past.book.counting({}), each.past.states)
        for name, each in sessions.items()
    }
    return Moment(
        {**own, "call": call, "position": run.position},
        denoiser.conditioning,
        pasts,
        denoiser._clean,
        None if run._decode is None else run._decode.state(),  # type: ignore[attr-defined]
        tuple(each.get_state() for each in generators),
    )


def begun(adapter: "Adapter", pipeline: Any, attributes: Mapping[str, Any], stack: Memory) -> Run:
    """Return a run of a pipeline with these attributes, to which `go_on` gives the rest."""
    # Past __init__, which would encode the prompt and what the video begins with.
    run = object.__new__(adapter.run_class)
    vars(run).update(attributes)
    run.adapter, run.pipeline, run._bar = adapter, pipeline, None
    run.stack = run.fit(stack)
    return run


def go_on(run: Run, moment: Moment) -> Run:
    """Return the generation from there on.

    Args:
        run: what `begun` gave for the moment's attributes.
        moment: where it goes on.
    """
    height, width = run.frame_size()
    # A decoder of its own: the feature cache of the other run goes on being written.
    decoder: Any = None if moment.decoder is None else run.decoder(height, width)
    if decoder is not None:
        decoder.restore(moment.decoder)
    run._decode = decoder
    denoiser = run.denoiser = run.new_denoiser(run.new_geometry(height, width), dict(moment.conditioning))
    denoiser.sessions = {name: Session(run.stack, denoiser.own_geometry, past) for name, past in moment.pasts.items()}
    denoiser._clean = moment.clean
    return run


def set_own_generators(run: Run, moment: Moment) -> None:
    """Set torch's own generators to where they were, if the generation draws from them."""
    for generator, state in zip(own_generators(), moment.own_generators, strict=False):
        if state.shape == generator.get_state().shape:  # not where the second one is another kind of device's
            generator.set_state(state.cpu())
