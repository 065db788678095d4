"""Poison rows: a note that a dead process left behind is what the next attempt goes by."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tide_ray.data.ledger import REASON, DeathLedger

KEYS = ["a", "b", "c"]


class ProcessDeathError(BaseException):
    """Stands for SIGKILL: unlike for an exception, the notes stay."""


def run(folder: Path, deadly: str | None = None) -> list[str]:
    """One attempt at the batch; where ``deadly`` runs the process dies, with what notes there are at that moment."""
    frozen: list[Path] = []

    async def row(key: str) -> str:
        await asyncio.sleep(0)
        if key == deadly:
            frozen.extend(folder.iterdir())
            raise ProcessDeathError
        return f"done {key}"

    async def attempt() -> list[str]:
        return await DeathLedger(str(folder)).run(
            KEYS, [lambda key=key: row(key) for key in KEYS], lambda index, reason: f"gave up {KEYS[index]}: {reason}"
        )

    try:
        return asyncio.run(attempt())
    finally:
        for path in frozen:
            path.touch()


def test_a_row_that_kills_three_times_is_given_up_and_the_others_are_done(tmp_path: Path) -> None:
    for _ in range(3):
        with pytest.raises(ProcessDeathError):
            run(tmp_path, deadly="b")
    assert run(tmp_path, deadly="b") == ["done a", f"gave up b: {REASON}", "done c"]


def test_a_process_that_dies_of_something_else_costs_no_row(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ProcessDeathError):
            run(tmp_path, deadly="b")
    assert run(tmp_path) == ["done a", "done b", "done c"]


def test_work_that_ends_leaves_no_notes(tmp_path: Path) -> None:
    assert run(tmp_path) == ["done a", "done b", "done c"]
    assert list(tmp_path.iterdir()) == []


def test_a_suspect_batch_runs_alone(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ProcessDeathError):
            run(tmp_path, deadly="a")
    running: list[str] = []
    seen: list[list[str]] = []

    async def row(key: str) -> str:
        running.append(key)
        await asyncio.sleep(0.01)
        seen.append(list(running))
        running.remove(key)
        return key

    async def both() -> None:
        ledger = DeathLedger(str(tmp_path))

        def batch(keys: list[str]) -> asyncio.Task[list[str]]:
            runs = [lambda key=key: row(key) for key in keys]
            return asyncio.create_task(ledger.run(keys, runs, lambda index, reason: reason))

        await asyncio.gather(batch(["x", "y"]), batch(KEYS), batch(["z", "w"]))

    asyncio.run(both())
    for key in KEYS:
        assert [running for running in seen if key in running] == [[key]]
