"""Which chunks of a clip there is something to learn from."""

from kvpack.errors import InvalidOptionError
from kvpack.memory.stack import Stack


def targets(stack: Stack, frames: int) -> list[int]:
    """Return the chunks of a clip of `frames` latent frames that attend something compressed.

    Raises:
        InvalidOptionError: if none does.

    >>> from kvpack.plugins.registry import registry
    >>> targets(registry().stack("packforcing", {"sink_frames": 4}), 20)
    [3, 4]
    """
    ledger, found = stack.ledger(), []
    for chunk in range(frames // stack.chunk_frames):
        if stack.selector.limit(len(ledger.archive)):
            found.append(chunk)
        ledger = ledger.commit().ledger
    if not found:
        raise InvalidOptionError(
            f"in a clip of {frames} latent frames no chunk of {stack.chunk_frames} attends anything that {stack.name} "
            "compressed; give longer clips, or a smaller sink_frames or recent_frames"
        )
    return found
