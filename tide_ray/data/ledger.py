"""Bounds what a poison row (one whose computation kills the process) can do to a job.

Ray restarts a dead actor and runs its batches again, for ever. So a batch is noted in a file while it runs; the note
of a process that died stays. A batch with one such note runs again as usual, for processes also die for other
reasons. A batch with more runs its rows one at a time, nothing beside them, each with a note of its own: a row whose
own note is found has killed a process by itself, and is given up with a reason.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from hashlib import sha256
from typing import TypeVar

from tide_ray.data.storage import join_attempt, off_loop, storage_path

Result = TypeVar("Result")

DEATHS_BEFORE_ISOLATION = 2
DEATHS_BEFORE_GIVING_UP = DEATHS_BEFORE_ISOLATION + 1
REASON = "the worker process died while this row was running alone"


class DeathLedger:
    """Notes in a place that all workers see. One per process; used from one event loop.

    Args:
        folder: made in the attempt's folder if need be; removed with it.
    """

    def __init__(self, folder: str) -> None:
        self._folder = storage_path(folder, "output")
        join_attempt(self._folder)
        self._gate = _Gate()

    async def run(
        self,
        keys: Sequence[str],
        runs: Sequence[Callable[[], Awaitable[Result]]],
        give_up: Callable[[int, str], Result],
    ) -> list[Result]:
        """The results of ``runs`` in order, with ``give_up(index, reason)`` in place of those of poison rows.

        Args:
            keys: what identifies each row from one attempt to the next.
            runs: starts the row's work; called at most once each.
            give_up: makes the result of a row that is not run any more.
        """
        batch_key = _digest("\n".join(keys))
        deaths = await self._num_notes(batch_key)
        async with self._note(batch_key):
            if deaths < DEATHS_BEFORE_ISOLATION:
                async with self._gate.shared():
                    return list(await asyncio.gather(*(run() for run in runs)))
            results = []
            for index, (key, run) in enumerate(zip(keys, runs, strict=True)):
                async with self._gate.alone():
                    results.append(await self._run_alone(key, run, partial(give_up, index)))
            return results

    async def _run_alone(
        self, key: str, run: Callable[[], Awaitable[Result]], give_up: Callable[[str], Result]
    ) -> Result:
        row_key = _digest(f"alone {key}")
        if await self._num_notes(row_key):
            return give_up(REASON)
        async with self._note(row_key):
            return await run()

    async def _num_notes(self, key: str) -> int:
        return await off_loop(self._folder, lambda: len(list(self._folder.glob(f"{key}.*"))))

    @asynccontextmanager
    async def _note(self, key: str) -> AsyncIterator[None]:
        path = self._folder / f"{key}.{uuid.uuid4().hex}"
        await off_loop(path, path.touch)
        # Also removed when the work raises: an exception is not a death.
        try:
            yield
        finally:
            await off_loop(path, lambda: path.unlink(missing_ok=True))


class _Gate:
    """Many may be inside together, or one alone; who wants to be alone is not kept waiting by later arrivals."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._num_inside = 0
        self._num_wanting_alone = 0
        self._is_alone = False

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._is_alone and not self._num_wanting_alone)
            self._num_inside += 1
        try:
            yield
        finally:
            async with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._changed:
            self._num_wanting_alone += 1
            try:
                await self._changed.wait_for(lambda: not self._is_alone and not self._num_inside)
                self._is_alone = True
            finally:
                self._num_wanting_alone -= 1
        try:
            yield
        finally:
            async with self._changed:
                self._is_alone = False
                self._changed.notify_all()


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]
