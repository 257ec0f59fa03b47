"""The least seconds that a chunk takes on a card of a given speed: by its operations, and by the bytes that move."""

from dataclasses import asdict, dataclass

from kvpack.errors import InvalidOptionError
from kvpack.planning.planner import Plan


@dataclass(frozen=True)
class Roofline:
    """Seconds of the last chunk's forwards, neither less than those of its operations nor of its bytes."""

    operations: float
    bytes: float

    @property
    def seconds(self) -> float:
        """The larger, which limits."""
        return max(self.operations, self.bytes)

    @property
    def limit(self) -> str:
        """What limits."""
        return "operations" if self.operations >= self.bytes else "bandwidth"

    def to_dict(self) -> dict[str, float | str]:
        """Return plain data that JSON can hold."""
        return {**asdict(self), "seconds": self.seconds, "limit": self.limit}


def roofline(plan: Plan, forwards: int, branches: int, weights: int, tflops: float, bandwidth: float) -> Roofline:
    """Return the least seconds of a chunk; decoding and compression are not in it.

    Bytes are those that must move at least: in each forward the weights once a guidance branch, and keys and values of
    what is attended, the chunk's own included, once. Activations, and rotating keys, move more.

    Args:
        plan: of the generation.
        forwards: of a chunk, the commit's included.
        branches: guidance branches.
        weights: bytes of the transformer's weights.
        tflops: 10^12 operations a second that the card sustains.
        bandwidth: 10^9 bytes a second of its memory.

    Raises:
        InvalidOptionError: if a speed is not positive.

    >>> Roofline(2.0, 0.5).seconds, Roofline(2.0, 0.5).limit
    (2.0, 'operations')
    """
    for name, value in (("--tflops", tflops), ("--bandwidth", bandwidth)):
        if not value > 0:
            raise InvalidOptionError(f"{name} must be above 0, got {value:g}")
    each = plan.full_kv_bytes // plan.full_tokens  # of a token in all videos and branches
    # Weights are read again by each branch, and by each forward.
    moved = forwards * (branches * weights + each * plan.attended_tokens)
    return Roofline(plan.flops_per_chunk / (tflops * 1e12), moved / (bandwidth * 1e9))
