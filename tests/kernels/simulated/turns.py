"""Makes Numba's CUDA simulator quick, and gives it the warp operations that it lacks.

The simulator starts an operating system's thread for every CUDA thread and polls them all, which costs seconds for a
few blocks. Here the threads of a block take turns: each runs alone until it waits for others, in a fixed order. When
all of them wait and nobody can go on, the kernel has a deadlock and the test fails at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.cuda.simulator import kernel, kernelapi

WARP = 32
BLOCK = "syncthreads"


class TurnTaker(kernel.BlockThread):
    """A CUDA thread that runs only when it is its turn."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.turn = threading.Semaphore(0)
        self.seen: dict[int, Any] = {}

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.abort:
                super().run()
        finally:
            self._manager.leave(self)

    def exchange(self, group: Any, members: set[int], value: Any) -> dict[int, Any]:
        """Leave a value, wait until all members that still run have left theirs, and get them all by thread."""
        self._manager.arrive(self, group, members, value)
        self._manager.turn.release()
        self.turn.acquire()
        if self.abort:
            raise RuntimeError("another thread of the block failed")
        return self.seen

    def syncthreads(self) -> None:
        self.exchange(BLOCK, self._manager.everyone, None)

    def _reduced(self, value: Any, reduce: Callable[[list[bool]], Any]) -> int:
        return int(reduce([bool(v) for v in self.exchange(BLOCK, self._manager.everyone, value).values()]))

    def syncthreads_count(self, value: Any) -> int:
        return self._reduced(value, sum)

    def syncthreads_or(self, value: Any) -> int:
        return self._reduced(value, any)

    def syncthreads_and(self, value: Any) -> int:
        return self._reduced(value, all)


class TurnManager(kernel.BlockManager):
    """Runs a block's threads by turns."""

    def run(self, grid_point: Any, *args: Any) -> None:
        def target() -> None:
            self._f(*args)

        points = np.ndindex(*self._block_dim)
        threads = [TurnTaker(target, self, grid_point, point, self._debug) for point in points]
        self.turn = threading.Semaphore(0)
        self.everyone = {thread.thread_id for thread in threads}
        self._alive = set(self.everyone)
        self._ready = deque(threads)
        self._waiting: dict[Any, tuple[set[int], dict[TurnTaker, Any]]] = {}
        for thread in threads:
            thread.start()
        while self._ready:
            self._ready.popleft().turn.release()
            self.turn.acquire()
        failed = [thread.exception for thread in threads if thread.exception is not None]
        stuck = [thread for _, values in self._waiting.values() for thread in values]
        for thread in stuck:
            thread.abort = True
            thread.turn.release()
            self.turn.acquire()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0][0].with_traceback(failed[0][1])
        if stuck:
            raise RuntimeError(f"deadlock: {len(stuck)} of {len(threads)} threads wait for each other")

    def arrive(self, thread: TurnTaker, group: Any, members: set[int], value: Any) -> None:
        _, values = self._waiting.setdefault(group, (members, {}))
        values[thread] = value
        self._release(group)

    def leave(self, thread: TurnTaker) -> None:
        self._alive.discard(thread.thread_id)
        if thread.exception is not None:
            self._ready.clear()
        else:
            for group in list(self._waiting):
                self._release(group)
        self.turn.release()

    def _release(self, group: Any) -> None:
        members, values = self._waiting[group]
        if {thread.thread_id for thread in values} >= members & self._alive:
            del self._waiting[group]
            seen = {thread.thread_id: value for thread, value in values.items()}
            for thread in sorted(values, key=lambda thread: thread.thread_id):
                thread.seen = seen
                self._ready.append(thread)


def _lanes(mask: int, value: Any) -> tuple[int, dict[int, Any]]:
    """The caller's lane, and what each lane of its warp that ``mask`` names has left."""
    thread: Any = threading.current_thread()
    warp, lane = divmod(thread.thread_id, WARP)
    mask = int(mask) & 0xFFFFFFFF
    members = {warp * WARP + other for other in range(WARP) if mask >> other & 1}
    seen = thread.exchange((warp, mask), members & thread._manager.everyone, value)
    return lane, {other % WARP: left for other, left in seen.items()}


def _syncwarp(_cuda: Any, mask: int = 0xFFFFFFFF) -> None:
    _lanes(mask, None)


def _shfl(_cuda: Any, mask: int, value: Any, source: int | tuple[int, ...]) -> Any:
    """As on a GPU; of several lanes at once it gives a tuple, which twins of whole-warp instructions use."""
    values = _lanes(mask, value)[1]
    if isinstance(source, tuple):
        return tuple(values[lane] for lane in source)
    return values[int(source) % WARP]


def _shfl_xor(_cuda: Any, mask: int, value: Any, step: int) -> Any:
    lane, values = _lanes(mask, value)
    return values.get(lane ^ int(step), value)


def _shfl_up(_cuda: Any, mask: int, value: Any, step: int) -> Any:
    lane, values = _lanes(mask, value)
    return values.get(lane - int(step), value)


def _ballot(_cuda: Any, mask: int, predicate: Any) -> int:
    return sum(1 << lane for lane, bit in _lanes(mask, bool(predicate))[1].items() if bit)


def install() -> None:
    """Change the simulator for this process."""
    kernel.BlockManager = TurnManager
    fake = kernelapi.FakeCUDAModule
    fake.syncwarp, fake.ballot_sync = _syncwarp, _ballot
    fake.shfl_sync, fake.shfl_xor_sync, fake.shfl_up_sync = _shfl, _shfl_xor, _shfl_up
