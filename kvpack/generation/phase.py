"""What a forward of the transformer is: a denoising step, a commit, or one of a compressor's tokens."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from kvpack.memory.layer import ForwardLayer
from kvpack.memory.ledger import BlockEntry
from kvpack.memory.session import Session


@dataclass(frozen=True, eq=False)
class Phase:
    """What the forwards inside a block of code are; `Denoiser.during` hands it to them.

    Args:
        kind: a denoising step, the commit of a clean chunk, or a forward of a compressor's tokens alone.
        latents: the clean chunk of a commit.
        pieces: pieces whose compressed tokens are in the forward, behind those of the chunk in a commit.
        end_given: whether the last frame of the chunk is given, and clean in every denoising step.
        steps: denoising forwards of each guidance branch so far, for pipelines that do not say their step.
    """

    kind: Literal["denoise", "commit", "compress"] = "denoise"
    latents: Tensor | None = None
    pieces: tuple[BlockEntry, ...] = ()
    end_given: bool = False
    steps: Counter[str] = field(default_factory=Counter)

    def announce(self, session: Session, branch: str, step: int | None) -> Sequence[ForwardLayer]:
        """Tell a branch's session what the coming forward is, and return each layer's memory for it.

        Args:
            session: memory of the branch.
            branch: its name.
            step: denoising step that the pipeline says; it is counted if None.
        """
        if self.kind == "commit":
            return session.commit(self.pieces, self.latents)
        if self.kind == "compress":
            return session.compress(*self.pieces)
        counted = self.counted(branch)
        return session.denoise(counted if step is None else step)

    def counted(self, branch: str) -> int:
        """Return the step of a branch's coming denoising forward, if none was left out before it."""
        self.steps[branch] += 1
        return self.steps[branch] - 1  # of this phase alone: another try of the chunk is a phase of its own
