"""Heads over several processes: what crosses between them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from kvpack.errors import ParallelError, PolicyError, first_line

#: How far the latents of two ranks may be apart, as a part of their size; other noise or prompts give about 1.
_APART = 0.1


@dataclass(frozen=True)
class Shard:
    """One of several processes, each of which holds as many heads of every layer; all do the same calls in one order.

    Args:
        ranks: how many there are.
        rank: which one this is.
        group: their process group.
        device: where what crosses lies.
        sent: bytes that this rank has sent to others, by kind.
    """

    ranks: int
    rank: int
    group: Any
    device: torch.device = field(compare=False)
    sent: "Counter[str]" = field(default_factory=Counter, compare=False)

    def missing(self, tokens: int) -> int:
        """Return how many tokens there must be more for equal shares.

        >>> Shard(4, 0, None, torch.device("cpu")).missing(10)
        2
        """
        return -tokens % self.ranks

    def to_heads(self, mine: Tensor, tokens: int) -> Tensor:
        """Return all tokens of this rank's heads.

        Args:
            mine: this rank's tokens of all heads, `[rows, share, heads, head_dim]`.
            tokens: how many there are on all ranks; what follows them fills the shares and is dropped.
        """
        parts = mine.unflatten(2, (self.ranks, -1)).permute(2, 1, 0, 3, 4)  # (ranks, share, rows, some heads, head_dim)
        got = self._all_to_all(parts.contiguous())
        return got.flatten(0, 1)[:tokens].transpose(0, 1)  # (rows, tokens, some heads, head_dim)

    def to_tokens(self, mine: Tensor) -> Tensor:
        """Return this rank's tokens of all heads, of all tokens of its heads; the way back from `to_heads`."""
        filled = pad(mine.transpose(0, 1), (0, 0, 0, 0, 0, 0, 0, self.missing(mine.shape[1])))
        parts = filled.unflatten(0, (self.ranks, -1))  # (ranks, share, rows, some heads, head_dim)
        got = self._all_to_all(parts.contiguous())
        return got.permute(2, 1, 0, 3, 4).flatten(2, 3)  # (rows, share, heads, head_dim)

    def sum(self, mine: Tensor) -> Tensor:
        """Return the sum of a tensor over ranks, the same bits on all of them."""
        total = mine.detach().contiguous().clone()
        # As in a ring: all shares but one, once to sum and once to hand round.
        self._cross("sums", 2 * (self.ranks - 1) * total.nbytes // self.ranks, dist.all_reduce, total, group=self.group)
        return total

    def gather(self, mine: Tensor, dim: int) -> Tensor:
        """Return all heads of a tensor whose axis `dim` is this rank's."""
        own = mine.detach().to(self.device).contiguous()  # an archive may lie on the host
        parts = [torch.empty_like(own) for _ in range(self.ranks)]
        self._cross("gathers", (self.ranks - 1) * own.nbytes, dist.all_gather, parts, own, group=self.group)
        return torch.cat(parts, dim=dim).to(mine.device)

    def own(self, every: Tensor, dim: int) -> Tensor:
        """Return this rank's heads of a tensor, apart from the rest."""
        return every.chunk(self.ranks, dim=dim)[self.rank].clone()

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """Return the largest of each number over ranks."""
        found = torch.tensor(numbers, dtype=torch.float32, device=self.device)
        size = 2 * (self.ranks - 1) * found.nbytes // self.ranks
        self._cross("checks", size, dist.all_reduce, found, op=dist.ReduceOp.MAX, group=self.group)
        return [float(each) for each in found.tolist()]

    def same(self, latents: Tensor) -> Tensor:
        """Return the first rank's latents.

        Raises:
            ParallelError: on every rank, if one has made others, as under another seed or prompt.
        """
        first = latents.detach().contiguous().clone()
        size = first.nbytes * (self.ranks - 1) if self.rank == 0 else 0
        self._cross("latents", size, dist.broadcast, first, src=dist.get_global_rank(self.group, 0), group=self.group)
        apart = (latents - first).float().norm() / first.float().norm().clamp(min=1e-30)  # no NaN where all are 0
        if self.largest([float(apart)])[0] > _APART:
            raise ParallelError(
                "the ranks made different latents; give all of them the same arguments, and generators of the same seed"
            )
        return first

    @contextmanager
    def together(self, what: type[Exception] = PolicyError) -> Iterator[None]:
        """Raise `what` in every rank if the block raised something in another, so that none waits for it."""
        try:
            yield
        except Exception:
            self.largest([1.0])
            raise
        if self.largest([0.0])[0]:
            raise what(f"another rank than this one, {self.rank} of {self.ranks}, has failed; its own error says why")

    def _all_to_all(self, parts: Tensor) -> Tensor:
        """Return from each rank the part that is for this one."""
        got = torch.empty_like(parts)
        size = parts.nbytes * (self.ranks - 1) // self.ranks
        self._cross("tokens", size, dist.all_to_all_single, got, parts, group=self.group)
        return got

    def _cross(self, kind: str, size: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except RuntimeError as error:
            raise ParallelError(
                f"rank {self.rank} of {self.ranks} waits for another in vain, which has ended or is stuck "
                f"({first_line(error)}); start all of them again, and resume from the last snapshot"
            ) from error
        self.sent[kind] += size


def agreed(shard: Shard | None, fine: bool, choices: Sequence[Tensor | None]) -> bool:
    """Return whether all is fine on all processes; `choices` of blocks, one a layer, must be the same on them.

    Raises:
        ParallelError: on every process, if they are not.
    """
    if shard is None:
        return fine
    made = [each.flatten() for each in choices if each is not None]  # (rows * chosen,) of each layer
    chosen = torch.cat(made).tolist() if made else []
    mark = float(crc32(repr(chosen).encode()) % (1 << 24))  # float32 holds it
    # The least is the largest of their negatives: one call for all three.
    wrong, most, least = shard.largest([float(not fine), mark, -mark])
    if most != -least:
        raise ParallelError(
            "the ranks chose different blocks; a selector whose class says by_head = True must pass its scores through "
            "query.mean_heads"
        )
    return not wrong
