"""Making of rollouts in one process, or in several of one thread each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from benchmarks.leaderboard.rollout import finished, make
from benchmarks.leaderboard.tasks import Task
from benchmarks.report import say


def run(tasks: Sequence[Task], processes: int) -> dict[Path, str]:
    """Make all tasks that are not finished; one that fails does not stop the others.

    Args:
        tasks: equal ones are made once.
        processes: how many run at a time.

    Returns:
        What went wrong, by folder of the task.
    """
    due = {task.folder: task for task in tasks if not finished(task)}
    say(f"{len(due)} rollouts to make, {len({task.folder for task in tasks}) - len(due)} kept from before")
    failed: dict[Path, str] = {}
    for number, (task, error) in enumerate(_made(list(due.values()), processes), start=1):
        say(f"{number}/{len(due)} {task.name}, seed {task.seed}: {error or 'done'}")
        if error:
            failed[task.folder] = error
    return failed


def _made(tasks: Sequence[Task], processes: int) -> Iterator[tuple[Task, str]]:
    if processes == 1 or len(tasks) < 2:
        yield from ((task, make(task)) for task in tasks)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes that are started
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(make, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
