"""Draining: work in progress is finished, or dropped when its time is over; SIGTERM asks for it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from tide_ray.data import drain
from tide_ray.data.drain import (
    Drainable,
    DrainRequest,
    TerminatedError,
    rows_unless_drained,
    sigterm_calls,
    terminate,
)


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "POLL_SECONDS", 0.02)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "drain")


async def work(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return f"took {seconds}"


def test_without_a_request_everything_is_finished(path: str) -> None:
    async def main() -> list[str | None]:
        worker = Drainable(path)
        return list(await asyncio.gather(*(worker.run(lambda s=s: work(s)) for s in (0, 0.1))))

    assert asyncio.run(main()) == ["took 0", "took 0.1"]


def test_work_in_progress_has_its_time_and_what_takes_longer_is_dropped(path: str) -> None:
    async def main() -> tuple[list[str | None], str | None, float]:
        worker = Drainable(path)
        running = asyncio.gather(*(worker.run(lambda s=s: work(s)) for s in (0.3, 60)))
        await asyncio.sleep(0.1)
        DrainRequest(path).make(1.0)
        start = time.monotonic()
        results = list(await running)
        assert await worker.is_requested()
        return results, await worker.run(lambda: work(0)), time.monotonic() - start

    results, late, seconds = asyncio.run(main())
    assert results == ["took 0.3", None]
    assert late is None
    assert 0.9 < seconds < 5


def test_a_cancellation_that_is_no_drain_is_passed_on(path: str) -> None:
    async def main() -> None:
        worker = Drainable(path)
        task = asyncio.create_task(worker.run(lambda: work(60)))
        await asyncio.sleep(0.05)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())


def test_reads_pass_on_no_rows_once_asked_to_stop(path: str) -> None:
    table = pa.table({"row_id": ["a", "b"]})
    assert rows_unless_drained(table, path).num_rows == 2
    DrainRequest(path).make(3)
    assert rows_unless_drained(table, path) == table.slice(0, 0)


def test_sigterm_calls_the_innermost_action_and_the_handler_before_comes_back() -> None:
    calls: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_calls(lambda: calls.append("outer")):
        with sigterm_calls(lambda: calls.append("inner")):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert calls == ["inner", "outer"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_sigterm_with_nothing_to_drain_ends_the_block_past_error_handling() -> None:
    def block() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            raise AssertionError("handled as an error") from None

    with pytest.raises(TerminatedError), sigterm_calls(terminate):
        block()


def test_another_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with sigterm_calls(terminate):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
