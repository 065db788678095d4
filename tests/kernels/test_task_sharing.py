"""Every task of a parallel kernel is done once, also those of a thread that is held up."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
import pytest
from numba import prange

from tide_kernels.cpu import jit
from tide_kernels.task_sharing import new_ranges, share_out, take_task
from tide_kernels.vectors import LINE_BYTES


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = numba.get_num_threads()
    numba.set_num_threads(2)
    yield
    numba.set_num_threads(before)


@jit(parallel=True, nogil=True)
def _count(taken, workers, effort):  # type: ignore[no-untyped-def]
    """How often each task was taken, and by whom; worker 0 has ``effort`` to spend on each of its tasks."""
    ranges = new_ranges()
    num_workers = share_out(len(taken), ranges)
    for worker in prange(num_workers):
        task = take_task(ranges, worker, num_workers)
        while task >= 0:
            taken[task] += 1
            workers[task] = worker
            spent = 0.0
            for step in range(effort if worker == 0 else 0):
                spent += np.sqrt(step + spent)
            if spent < 0:
                workers[task] = -1
            task = take_task(ranges, worker, num_workers)


@pytest.mark.parametrize("num_tasks", [0, 1, 2, 3, 1001, 200_000])
def test_every_task_is_taken_once(num_tasks: int) -> None:
    taken, workers = np.zeros(num_tasks, np.int64), np.full(num_tasks, -1)
    _count(taken, workers, 0)
    assert (taken == 1).all()
    assert (workers >= 0).all()


def test_tasks_of_a_slow_thread_are_done_by_the_other() -> None:
    taken, workers = np.zeros(100, np.int64), np.full(100, -1)
    _count(taken, workers, 2_000_000)
    assert (taken == 1).all()
    shared = workers[:50]  # worker 0's own
    assert (shared == 1).sum() > 25
    assert (np.diff(shared) >= 0).all()  # taken from the end


def test_own_tasks_come_in_order_and_those_of_others_from_their_end() -> None:
    ranges = np.zeros(2 * LINE_BYTES // 8, np.int64)
    num_workers = share_out(7, ranges.ctypes.data)
    assert num_workers == 2
    assert take_task(ranges.ctypes.data, 0, 2) == 0
    taken = []
    while (task := take_task(ranges.ctypes.data, 1, 2)) >= 0:
        taken.append(task)
    assert taken == [3, 4, 5, 6, 2, 1]
    assert take_task(ranges.ctypes.data, 0, 2) == -1
