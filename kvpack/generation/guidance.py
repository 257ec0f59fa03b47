"""Guidance branches over processes: each process runs one of them, and is told what the others predict."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kvpack.errors import InvalidOptionError, ParallelError
from kvpack.memory.shard import Shard


class Guidance:
    """One of several processes, which has the memory of one guidance branch.

    A pipeline asks for its branches one after the other, and looks at what they predict when it has asked for all of
    them: until then those of other processes are room for what they will send.

    Args:
        group: a process group, of which each process runs one branch.
        branches: their names, in the order of the ranks.
        device: where what crosses lies.

    Raises:
        InvalidOptionError: if there are not as many processes as branches.
    """

    def __init__(self, group: Any, branches: Sequence[str], device: torch.device) -> None:
        ranks = dist.get_world_size(group)
        if ranks != len(branches):
            raise InvalidOptionError(
                f"guidance_group has {ranks} processes, but this call has {len(branches)} guidance branches "
                f"({', '.join(branches)}); a process runs one of them, and guidance_scale above 1 makes two"
            )
        self.link = Shard(ranks, dist.get_rank(group), group, device)
        self.branches = tuple(branches)
        self._asked: dict[str, Tensor] = {}
        #: Whether the others were told, in this block, how it goes; whether they know of the error that ends it.
        self._told = self._known = False

    @property
    def own(self) -> str:
        """The branch that this process runs."""
        return self.branches[self.link.rank]

    def predicted(self, branch: str, forward: Callable[[], Tensor], room: Callable[[], Tensor]) -> Tensor:
        """Return what a branch predicts, or where that will be once all branches were asked for.

        Args:
            branch: its name.
            forward: runs the transformer; called for the process's own branch.
            room: returns an empty tensor as large as a prediction.

        Raises:
            ParallelError: if a branch is asked for again before all others were.
        """
        if branch in self._asked:  # a new step begins, though the one before is not settled
            self.require_settled()
        # Filled by `_exchange`, before anybody looks at it.
        self._asked[branch] = forward() if branch == self.own else room()
        made = self._asked[branch]
        if len(self._asked) == len(self.branches):
            self._exchange()
        return made

    def require_settled(self) -> None:
        """Raise `ParallelError` if a step has asked for some of the branches only."""
        if self._asked:
            missing = ", ".join(name for name in self.branches if name not in self._asked)
            raise ParallelError(
                f"a denoising step asked for branch {', '.join(self._asked)}, but not for {missing}, which another "
                "process waits to be asked for; where guidance is left out of some steps, set "
                "packforcing.guidance_group to None"
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise in every process if the block raises in one; inside of `block`."""
        self._told = self._known = True  # known: where the block raises, `link.together` tells the others
        with self.link.together():
            yield
        self._known = False

    @contextmanager
    def block(self) -> Iterator[None]:
        """Tell the others of an error of the block, of which they have not learned in `together`."""
        self._told = self._known = False
        try:
            yield
        except Exception:
            if not self._known:
                self.link.largest([1.0])  # the others wait in `link.together`, which is a `largest` too
            raise
        # Nothing was committed, as where a prompt replays nothing: another process may have failed all the same.
        if not self._told:
            with self.link.together():
                pass

    def _exchange(self) -> None:
        asked, self._asked = self._asked, {}  # taken first: the next step begins anew, whatever the exchange raises
        every = self.link.gather(asked[self.own], 0).chunk(self.link.ranks)
        for name, sent in zip(self.branches, every, strict=True):
            if name != self.own:
                asked[name].copy_(sent)  # in place: the pipeline holds this tensor already
