"""What actors and job tell each other when all that they share is a bucket."""

from __future__ import annotations

import asyncio
import pickle

import pyarrow as pa
import pytest

from tide_ray.data import drain
from tide_ray.data.drain import Drainable, DrainRequest, rows_unless_drained
from tide_ray.data.ledger import REASON, DeathLedger
from tide_ray.data.object_client import Bucket
from tide_ray.data.object_path import ObjectPath
from tide_ray.data.reports import Reporter, Reports
from tide_ray.data.storage import open_attempt, remove_folder, storage_path


@pytest.fixture
def scratch(bucket: str) -> ObjectPath:
    """That of an attempt which is on."""
    path = storage_path(f"{bucket}/out/_tmp/attempt", "output")
    assert isinstance(path, ObjectPath)
    open_attempt(path)
    return path


class ProcessDeathError(BaseException):
    """Stands for SIGKILL: unlike for an exception, the notes stay."""


def run_batch(folder: ObjectPath, deadly: str | None = None) -> list[str]:
    """One attempt at a batch of three rows; where ``deadly`` runs the process dies and its notes stay."""
    left: list[ObjectPath] = []

    async def row(key: str) -> str:
        if key == deadly:
            left.extend(folder.iterdir())
            raise ProcessDeathError
        return f"done {key}"

    async def attempt() -> list[str]:
        runs = [lambda key=key: row(key) for key in "abc"]
        return await DeathLedger(str(folder)).run("abc", runs, lambda index, reason: reason)

    try:
        return asyncio.run(attempt())
    finally:
        for path in left:
            path.touch()


def test_a_row_that_kills_three_times_is_given_up(scratch: ObjectPath) -> None:
    folder = scratch / "running"
    assert run_batch(folder) == ["done a", "done b", "done c"]
    assert not folder.is_dir()
    for _ in range(3):
        with pytest.raises(ProcessDeathError):
            run_batch(folder, deadly="b")
    assert run_batch(folder, deadly="b") == ["done a", REASON, "done c"]


def test_a_drain_is_heard_by_reads_and_by_actors(scratch: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "POLL_SECONDS", 0.02)
    path = str(scratch / "drain")
    table = pa.table({"row_id": ["a", "b"]})
    assert rows_unless_drained(table, path) == table

    async def main() -> str | None:
        worker = Drainable(path)
        running = asyncio.ensure_future(worker.run(lambda: asyncio.sleep(60, "finished")))
        await asyncio.sleep(0.05)
        DrainRequest(path).make(0.1)
        return await running

    assert asyncio.run(main()) is None
    assert rows_unless_drained(table, path).num_rows == 0


def test_the_job_fetches_only_reports_that_have_changed(scratch: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(scratch / "reports")
    busy, idle = Reporter(folder, "busy"), Reporter(folder, "idle")
    idle.rows_arrived(1)
    busy.rows_arrived(2)
    reports = pickle.loads(pickle.dumps(Reports(folder)))  # write tasks ask as well
    assert reports.totals()["started"] == 3
    busy.rows_arrived(4)
    fetched = []
    get = Bucket.get
    monkeypatch.setattr(Bucket, "get", lambda self, key: fetched.append(key) or get(self, key))
    assert reports.totals()["started"] == 7
    assert [key.rpartition("/")[2] for key in fetched] == ["busy.json"]


def test_an_actor_that_starts_after_its_attempt_is_over_does_not_go_on(scratch: ObjectPath) -> None:
    remove_folder(scratch)
    with pytest.raises(FileNotFoundError):
        Reporter(str(scratch / "reports"), "a")
    with pytest.raises(FileNotFoundError):
        DeathLedger(str(scratch / "running"))
    assert not scratch.is_dir()
