"""Windows that differ by layer and by head (LightX2V's hybrid windows; Forcing-KV, arXiv 2605.09681)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from kvpack.errors import InvalidOptionError, plain, require_int
from kvpack.memory.divided import Divided
from kvpack.memory.stack import Stack
from kvpack.policies.stacks import self_forcing


@dataclass(frozen=True)
class MixedWindows(Divided):
    """Rolling windows with sinks at their positions in the video, of which each layer, or each head, has its own.

    `shares` says for each layer, in a list, which window each of its heads has, as an index of `windows`. What is
    shorter than the model is gone through again and again: `[[0], [0], [0], [0], [1]]` gives every fifth layer the
    second window, `[[0, 1]]` every second head of all layers, `[[0, 1, 1], [0]]` both.

    Which heads do with a short window is a property of the checkpoint, which its user measures; Forcing-KV reads it
    from a file that comes with each model. The defaults follow LightX2V's `W2-W2-W2-W2-W21`: the sink and two chunks,
    the current one included, in four layers of five, and a long window in the fifth, here as long as the models were
    trained with. It is no measured choice. Under a new prompt as much is computed anew as the longest window still has.

    Args:
        chunk_frames: latent frames generated together.
        windows: latent frames attended in each window, the sink and the current chunk included.
        sinks: first latent frames that are never dropped in each window; one number is for all.
        shares: which window each layer's heads have.

    Raises:
        InvalidOptionError: if a window does not hold its sink and a chunk of history, or a share names no window.
    """

    chunk_frames: int = 3
    windows: Sequence[int] = (9, 21)
    sinks: Sequence[int] = (3,)
    shares: Sequence[Sequence[int]] = ((0,), (0,), (0,), (0,), (1,))
    name = "mixed-windows"

    def __post_init__(self) -> None:
        require_int("chunk_frames", self.chunk_frames, minimum=1)
        for option in ("windows", "sinks", "shares"):
            object.__setattr__(self, option, _tuples(option, getattr(self, option)))  # lists, where they come from JSON
        if len(self.sinks) not in (1, len(self.windows)) or not self.windows:
            raise InvalidOptionError(
                f"sinks must be one number, or one for each of windows, got {len(self.sinks)} sinks and "
                f"{len(self.windows)} windows"
            )
        self.check()

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:  # type: ignore[override]
        """A window each."""
        sinks = (*self.sinks,) * (len(self.windows) if len(self.sinks) == 1 else 1)
        pairs, same = zip(self.windows, sinks, strict=True), partial(self_forcing, commit=self.commit)
        return tuple(same(chunk_frames=self.chunk_frames, window_frames=w, sink_frames=s) for w, s in pairs)


def _tuples(option: str, given: object) -> tuple[object, ...]:
    """Return lists, and lists of lists, as tuples."""
    if not isinstance(given, list | tuple):
        raise InvalidOptionError(f"{option} must be a list, e.g. {getattr(MixedWindows, option)!r}, got {given!r}")
    return tuple(_tuples(option, each) if isinstance(each, list | tuple) else plain(each) for each in given)
