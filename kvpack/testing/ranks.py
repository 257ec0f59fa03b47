"""Several processes on one machine's CPU, for what is tested of them: a fork each, and gloo between them."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: How long the others may go on once one has failed.
_GRACE = 15.0


class RanksFailed(RuntimeError):
    """Some processes raised or ended.

    Args:
        errors: what was raised, by rank; "" of one that ended without a word.
    """

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {error or 'ended without a word'}" for rank, error in errors.items()))
        self.errors = errors


def run_ranks(ranks: int, work: Callable[[int], Any], *, seconds: float = 300.0) -> list[Any]:
    """Return what `work(rank)` gives in each of several forks of this process, between which there is a gloo group.

    Args:
        ranks: how many.
        work: returns plain data and tensors.
        seconds: after which all are ended.

    Raises:
        RanksFailed: if any of them raises, ends, or is not done in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        fork, given = multiprocessing.get_context("fork"), (ranks, work, Path(folder), seconds)
        children = [fork.Process(target=_work, args=(rank, *given)) for rank in range(ranks)]
        for each in children:
            each.start()
        _wait(children, time.monotonic() + seconds)
        told = {int(path.stem): path.read_text() for path in Path(folder).glob("*.txt")}
        if failed := [rank for rank in range(ranks) if not (Path(folder) / f"{rank}.pt").exists()]:
            raise RanksFailed({rank: told.get(rank, "") for rank in failed})
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def enable_ulysses(transformer: Any, ranks: int) -> None:
    """Split a transformer's tokens over all ranks of a gloo group, which diffusers does on accelerators only."""
    from diffusers import ContextParallelConfig

    there = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: 1
    try:
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
    finally:
        torch.accelerator.device_count = there


def _work(rank: int, ranks: int, work: Callable[[int], Any], folder: Path, seconds: float) -> None:
    status = 1
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)  # the threads of before are not there in a fork
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/group",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=seconds),
        )
        made = work(rank)
        torch.save(made, folder / f"{rank}.part")
        os.replace(folder / f"{rank}.part", folder / f"{rank}.pt")
        dist.barrier()
        status = 0
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(status)  # nothing of the parent's is torn down here


def _wait(children: Sequence[BaseProcess], deadline: float) -> None:
    while running := [each for each in children if each.is_alive()]:
        if any(each.exitcode for each in children):
            deadline = min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > deadline:
            for each in running:
                each.kill()
        connection.wait([each.sentinel for each in running], timeout=0.1)
