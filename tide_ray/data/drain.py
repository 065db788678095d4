"""Stopping a running job without losing what it has done: answers in progress are finished and written, no more begin.

The job asks by a file in a place that all workers see. Reads then pass on no rows, actors finish the rows that they
have or, when the time is up, drop them, and what is finished is written; the data set ends as if it were that short.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from tide_ray.data.reading import fetched
from tide_ray.data.storage import off_loop, replace_text, storage_path

Result = TypeVar("Result")

POLL_SECONDS = 0.5


class DrainRequest:
    """The job's side. ``path`` is a file in a folder of the attempt."""

    def __init__(self, path: str) -> None:
        self.path = path

    def make(self, seconds: float) -> None:
        """Ask all workers to stop; rows in progress have ``seconds``, counted by each worker from when it sees this."""
        replace_text(storage_path(self.path, "output"), str(seconds))


def rows_unless_drained(table: pa.Table, path: str) -> pa.Table:
    """All rows, or none once the job is asked to stop."""
    return table.slice(0, 0) if storage_path(path, "output").exists() else table


def todo_rows(files: pa.Table, drain_path: str) -> Iterator[pa.Table]:
    """A read task: the rows of Parquet files, named in the column ``file``, until the job is asked to stop."""
    for name in files["file"].to_pylist():
        with fetched(storage_path(name, "output")) as path:
            table = pq.read_table(path, partitioning=None)  # a folder NAME=VALUE above it is no column
        yield rows_unless_drained(table, drain_path)


class Drainable:
    """A worker's side: runs work that is dropped when the job is asked to stop. Used from one event loop."""

    def __init__(self, path: str) -> None:
        self._path = storage_path(path, "output")
        self._running: set[asyncio.Future[Any]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._is_over = False

    async def is_requested(self) -> bool:
        return await off_loop(self._path, self._path.exists)

    async def run(self, work: Callable[[], Awaitable[Result]]) -> Result | None:
        """What ``work`` returns, or None if the time for it is over."""
        if self._is_over:
            return None
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
        task = asyncio.ensure_future(work())
        self._running.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if self._is_over:
                return None
            raise
        finally:
            self._running.discard(task)

    async def _watch(self) -> None:
        is_requested = False
        while not is_requested:
            await asyncio.sleep(POLL_SECONDS)
            with suppress(OSError):  # a store that does not answer may do so the next time
                is_requested = await self.is_requested()
        await asyncio.sleep(float(await off_loop(self._path, self._path.read_text)))
        self._is_over = True
        for task in list(self._running):
            task.cancel()


class TerminatedError(BaseException):
    """SIGTERM came while there was nothing to drain. Not an Exception: it must pass everything that handles errors."""


@contextmanager
def sigterm_calls(action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` in the main thread for every SIGTERM during the block; nothing changes in another thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    """The action for times without work in progress."""
    raise TerminatedError
