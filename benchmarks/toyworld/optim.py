"""Muon for the matrices, AdamW for the rest, in fp32."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of a batch [N, rows, cols] to about one, by Newton-Schulz iteration."""
    wide = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if wide else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if wide else x


def shared_orthogonalise(matrices: Tensor) -> Tensor:
    """Orthogonalise a batch of which each process does its share."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or len(matrices) < 2:
        return orthogonalise(matrices)
    world, rank = dist.get_world_size(), dist.get_rank()
    each = -(-len(matrices) // world)
    padded = torch.cat([matrices, matrices[: each * world - len(matrices)]])
    gathered = [torch.empty_like(padded[:each]) for _ in range(world)]
    dist.all_gather(gathered, orthogonalise(padded[rank * each : (rank + 1) * each]).contiguous())
    return torch.cat(gathered)[: len(matrices)]


class Muon(torch.optim.Optimizer):
    """Muon on weights of two or more dimensions, matrices of one shape batched; steps have an RMS of 0.2 lr."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every group once."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        shapes: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for param in group["params"]:
            if param.grad is not None:
                shapes[(param.shape[0], param[0].numel())].append(param)
        for (rows, cols), params in shapes.items():
            updates = []
            for param in params:
                assert param.grad is not None
                state = self.state[param]
                buffer = state.setdefault("buffer", torch.zeros_like(param))
                buffer.lerp_(param.grad, 1 - group["momentum"])
                updates.append(param.grad.lerp(buffer, group["momentum"]).reshape(rows, cols))
            steps = shared_orthogonalise(torch.stack(updates)) * (0.2 * max(rows, cols) ** 0.5)
            for param, step in zip(params, steps, strict=True):
                param.mul_(1 - group["lr"] * group["decay"]).add_(step.view_as(param), alpha=-group["lr"])


def anneal(progress: float, flat: float = 0.65, floor: float = 0.02, warmup: float = 0.01) -> float:
    """Return the factor of the learning rate: short warm-up, flat, then linear down to the floor."""
    if progress < warmup:
        return 0.1 + 0.9 * progress / warmup
    return 1.0 if progress < flat else 1.0 - (1.0 - floor) * min(1.0, (progress - flat) / (1.0 - flat))


def set_rate(optimisers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Scale the first learning rate of every group by a factor."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = factor * group.setdefault("first_lr", group["lr"])
