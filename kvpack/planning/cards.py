"""How a generation fits a graphics card: which call brings weights there, and what of the memory has to change."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvpack.errors import BudgetError
from kvpack.planning.budget import Choice
from kvpack.planning.fit import GIB, MODEL_OFFLOAD, RESERVED_BYTES, SEQUENTIAL_OFFLOAD, WHOLE, Fit

#: Memory in GiB of the cards that people have.
CARDS = (8, 12, 16, 24, 32, 80)


@dataclass(frozen=True)
class Placed:
    """A generation on a card.

    Args:
        gpu_memory: the card's memory in GiB.
        call: what brings the weights there; None if it does not fit.
        fit: bytes on the card, with the memory that is held then.
        choice: the memory; None if it does not fit.
        missing: bytes that are too few.
    """

    gpu_memory: float
    call: str | None
    fit: Fit
    choice: Choice | None = None
    missing: float = 0

    @property
    def total(self) -> int:
        """Bytes on the card, with what CUDA takes."""
        return self.fit.totals[self.call or SEQUENTIAL_OFFLOAD] + RESERVED_BYTES

    @property
    def advice(self) -> str:
        """What to do, in a line."""
        if self.call is None or self.choice is None:
            return (
                f"does not fit {self.gpu_memory:g} GiB: with the least memory it is {self.missing / GIB:.1f} GiB too "
                "much; give a smaller --size or stack, or smaller --weights"
            )
        changed = " ".join(f"-o {name}={value}" for name, value in self.choice.changes.items())
        budget = math.floor(self.choice.budget_bytes / 1e6) / 1e3
        told = f" and {changed}, as budget_gb={budget:g} chooses" if changed else ""
        return f"fits {self.gpu_memory:g} GiB with {self.call}{told}"


def place(fit: Fit, gpu_memory: float, choose: Callable[[float], Choice], held: int) -> Placed:
    """Return the fastest way that loses nothing, or else the least loss with model offload, or else sequential offload.

    Args:
        fit: of the model.
        gpu_memory: the card's memory in GiB.
        choose: returns the memory that so many gigabytes hold; raises `BudgetError` if none does.
        held: bytes of the memory as it was asked for.

    Raises:
        InvalidOptionError: if the card has no memory.
    """
    room = {call: fit.room(call, gpu_memory) for call in fit.beside}
    fast = [call for call in (WHOLE, MODEL_OFFLOAD) if held <= room[call]]  # with the memory as it was asked for
    missing = math.inf
    for call in (*fast, MODEL_OFFLOAD, SEQUENTIAL_OFFLOAD):
        try:
            choice = choose(max(1, room[call]) / 1e9)  # 0 is no budget, and `choose` is to say the least that would do
        except BudgetError as error:
            # What is missing is told of the card, not of keys and values alone.
            least = replace(fit, kv=int(error.least_bytes)).totals[call] + RESERVED_BYTES
            missing = min(missing, least - gpu_memory * GIB)
            continue
        return Placed(gpu_memory, call, replace(fit, kv=choice.held_bytes), choice)
    return Placed(gpu_memory, None, fit, None, missing)
