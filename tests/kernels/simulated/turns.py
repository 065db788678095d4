"""Makes Numba's CUDA simulator quick, and gives it the warp operations that it lacks.

The simulator starts an operating system's thread for every CUDA thread and polls them all, which costs seconds for a
few blocks. Here the threads of a block are greenlets that take turns: each runs alone until it waits for others, in a
fixed order. When all of them wait and nobody can go on, the kernel has a deadlock and the test fails at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from numba.cuda.simulator import kernel, kernelapi

WARP = 32
BLOCK = "syncthreads"


class TurnTaker(greenlet):
    """A CUDA thread that runs only when it is its turn."""

    def __init__(self, target: Callable[[], None], manager: TurnManager, block: Any, point: Any) -> None:
        super().__init__()
        self._target = target
        self._manager = manager
        self.blockIdx, self.threadIdx = kernelapi.Dim3(*block), kernelapi.Dim3(*point)
        width, height, _ = manager._block_dim
        self.thread_id = self.threadIdx.x + width * (self.threadIdx.y + height * self.threadIdx.z)
        self.exception: Exception | None = None
        self.abort = False
        self.seen: dict[int, Any] = {}

    def run(self) -> None:
        try:
            self._target()
        except Exception as error:
            error.add_note(f"in thread {self.threadIdx} of block {self.blockIdx}")
            self.exception = error
        self._manager.leave(self)

    def exchange(self, group: Any, members: set[int], value: Any) -> dict[int, Any]:
        """Leave a value, wait until all members that still run have left theirs, and get them all by thread."""
        self._manager.arrive(self, group, members, value)
        self.parent.switch()
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

        threads = [TurnTaker(target, self, grid_point, point) for point in np.ndindex(*self._block_dim)]
        self.everyone = {thread.thread_id for thread in threads}
        self._alive = set(self.everyone)
        self._lanes: dict[tuple[int, int], set[int]] = {}
        self._ready = deque(threads)
        self._waiting: dict[Any, tuple[set[int], dict[TurnTaker, Any]]] = {}
        while self._ready:
            self._ready.popleft().switch()
        failed = [thread.exception for thread in threads if thread.exception is not None]
        stuck = [thread for thread in threads if thread]  # a greenlet is true from its first turn to its end
        for thread in stuck:
            thread.abort = True
            thread.switch()
        if failed:
            raise failed[0]
        if stuck:
            raise RuntimeError(f"deadlock: {len(stuck)} of {len(threads)} threads wait for each other")

    def lanes(self, warp: int, mask: int) -> tuple[tuple[int, int], set[int]]:
        """The group of a warp's lanes that ``mask`` names, and its members by their numbers in the block."""
        group = warp, mask & 0xFFFFFFFF
        if group not in self._lanes:
            named = {warp * WARP + lane for lane in range(WARP) if mask >> lane & 1}
            self._lanes[group] = named & self.everyone
        return group, self._lanes[group]

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

    def _release(self, group: Any) -> None:
        members, values = self._waiting[group]  # only members wait, so that counts are enough
        if len(values) == len(members) or len(values) == len(members & self._alive):
            del self._waiting[group]
            seen = {thread.thread_id: value for thread, value in values.items()}
            for thread in sorted(values, key=lambda thread: thread.thread_id):
                thread.seen = seen
                self._ready.append(thread)


def _lanes(mask: int, value: Any) -> tuple[int, dict[int, Any]]:
    """The caller's number in its block, and by theirs what each lane of its warp that ``mask`` names has left."""
    thread: Any = getcurrent()
    group, members = thread._manager.lanes(thread.thread_id // WARP, int(mask))
    assert thread.thread_id in members, "the mask does not name the lane that calls"
    return thread.thread_id, thread.exchange(group, members, value)


def _syncwarp(_cuda: Any, mask: int = 0xFFFFFFFF) -> None:
    _lanes(mask, None)


def _shfl(_cuda: Any, mask: int, value: Any, source: int | tuple[int, ...]) -> Any:
    """As on a GPU; of several lanes at once it gives a tuple, which twins of whole-warp instructions use."""
    caller, values = _lanes(mask, value)
    first = caller - caller % WARP
    if isinstance(source, tuple):
        return tuple(values[first + lane] for lane in source)
    return values[first + int(source) % WARP]


def _shfl_xor(_cuda: Any, mask: int, value: Any, step: int) -> Any:
    caller, values = _lanes(mask, value)
    return values.get(caller ^ int(step), value)


def _shfl_up(_cuda: Any, mask: int, value: Any, step: int) -> Any:
    caller, values = _lanes(mask, value)
    return values.get(caller - int(step), value)


def _ballot(_cuda: Any, mask: int, predicate: Any) -> int:
    return sum(1 << thread % WARP for thread, bit in _lanes(mask, bool(predicate))[1].items() if bit)


def install() -> None:
    """Change the simulator for this process."""
    kernel.BlockManager = TurnManager
    kernelapi.threading = SimpleNamespace(current_thread=getcurrent)  # whose indices and barriers it asks for
    fake = kernelapi.FakeCUDAModule
    fake.syncwarp, fake.ballot_sync = _syncwarp, _ballot
    fake.shfl_sync, fake.shfl_xor_sync, fake.shfl_up_sync = _shfl, _shfl_xor, _shfl_up
