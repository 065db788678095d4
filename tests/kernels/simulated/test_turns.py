"""What the simulator's threads give each other, and how a kernel ends that cannot go on."""

from __future__ import annotations

import numpy as np
import pytest
from numba import cuda

ALL_LANES = 0xFFFFFFFF


def test_lanes_of_a_warp_exchange_values_and_keep_their_own_where_there_is_no_partner() -> None:
    @cuda.jit
    def exchange(out):
        thread = cuda.threadIdx.x
        out[0, thread] = cuda.shfl_xor_sync(ALL_LANES, thread, 8)
        out[1, thread] = cuda.shfl_up_sync(ALL_LANES, thread, 3)
        out[2, thread] = cuda.shfl_sync(ALL_LANES, thread, 33)
        out[3, thread] = cuda.ballot_sync(ALL_LANES, thread % 2)
        out[4, thread] = cuda.syncthreads_count(thread < 5)

    threads = np.arange(40)  # the second warp has eight
    out = np.zeros((5, 40), np.int64)
    exchange[1, 40](out)
    assert out[0].tolist() == [thread ^ 8 for thread in range(32)] + list(range(32, 40))
    assert out[1].tolist() == [0, 1, 2, *range(29), 32, 33, 34, *range(32, 37)]
    assert out[2].tolist() == (threads // 32 * 32 + 1).tolist()
    assert out[3].tolist() == [0xAAAAAAAA] * 32 + [0xAA] * 8
    assert out[4].tolist() == [5] * 40


def test_threads_that_wait_for_each_other_are_a_deadlock_and_one_that_is_done_is_not_waited_for() -> None:
    @cuda.jit
    def wait(first, second):
        if cuda.threadIdx.x < first:
            cuda.syncthreads()
        elif cuda.threadIdx.x < second:
            cuda.syncwarp()

    wait[2, 32](32, 32)
    wait[2, 32](0, 16)
    wait[2, 32](16, 16)
    with pytest.raises(RuntimeError, match="deadlock: 24 of 32 threads wait for each other"):
        wait[2, 32](16, 24)


def test_a_thread_that_fails_ends_the_kernel_with_its_own_error() -> None:
    reached = []

    @cuda.jit
    def fail(mask):
        cuda.syncthreads()
        cuda.syncwarp(mask)
        reached.append(cuda.threadIdx.x)
        if cuda.threadIdx.x == 5:
            raise ValueError("five")
        cuda.syncthreads()
        reached.append("the end")

    for _ in range(2):
        reached.clear()
        with pytest.raises(ValueError, match="five") as error:
            fail[2, 32](ALL_LANES)
        assert error.value.__notes__ == ["in thread (5, 0, 0) of block (0, 0, 0)"]
        assert reached == [0, 1, 2, 3, 4, 5]
    with pytest.raises(AssertionError, match="does not name the lane"):
        fail[1, 32](0xFFFF)
