"""Bounds what a poison row (one whose computation kills the process) can do to a job.

Ray restarts a dead actor and runs its batches again, for ever. So a batch is noted in a file while it runs; the note
of a process that died stays. A batch with one such note runs again as usual, for processes also die for other
reasons. A batch with more runs its rows one at a time, nothing beside them, each with a note of its own: a row whose
own note is found has killed a process by itself, and is given up with a reason.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

DEATHS_BEFORE_ISOLATION = 2
DEATHS_BEFORE_GIVING_UP = DEATHS_BEFORE_ISOLATION + 1
REASON = "the worker process died while this row was running alone"


class DeathLedger:
    """Notes in a folder that all workers see. One per process; used from one event loop.

    Args:
        folder: made in the attempt's folder if need be; removed with it.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        # Not its parents: without the attempt's folder, this actor's attempt is over (see ``parts``).
        self._folder.mkdir(exist_ok=True)
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
        deaths = len(list(self._folder.glob(f"{batch_key}.*")))
        with self._note(batch_key):
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
        if any(self._folder.glob(f"{row_key}.*")):
            return give_up(REASON)
        with self._note(row_key):
            return await run()

    @contextmanager
    def _note(self, key: str) -> Iterator[None]:
        path = self._folder / f"{key}.{uuid.uuid4().hex}"
        path.touch()
        # Also removed when the work raises: an exception is not a death.
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


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
