"""Faults for real: processes are killed and starved on a cluster of two nodes, and every row is there once.

One run of the benchmark's harness with a tiny model; what every scenario gave with demo is in ``jobs/results``. Engines
wait for the fault: a tiny model's jobs were over before it struck.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from programs import ROOT, run

ROWS = 96
EXIT_CODES = {
    "driver-killed-at-a-third": [0],
    "actor-killed": [0],
    "raylet-killed": [0],
    "poison-row": [3],
    "sigterm": [143, 0],
    "two-drivers": [0, 2],
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def report(tiny_llama_folder: Path) -> dict[str, Any]:
    done = run(
        ROOT / "jobs" / "benchmark.py", "faults", "--scenarios", ",".join(EXIT_CODES), "--rows", ROWS,
        "--model", tiny_llama_folder, "--dtype", "float32", "--max-tokens", 8, "--max-num-seqs", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {row["scenario"]: row for row in facts["scenarios"]}


@pytest.mark.parametrize("scenario", EXIT_CODES)
def test_no_row_is_lost_or_doubled(report: dict[str, Any], scenario: str) -> None:
    row = report[scenario]
    assert row["exit_codes"] == EXIT_CODES[scenario]
    assert (row["expected"], row["committed"], row["lost"], row["doubled"]) == (ROWS, ROWS, 0, 0)
    assert row["rejected"] == (scenario == "poison-row")


def test_what_was_committed_before_a_kill_is_not_generated_again(report: dict[str, Any]) -> None:
    row = report["driver-killed-at-a-third"]
    assert ROWS // 3 <= row["committed_at_fault"] < ROWS
    assert row["regenerated"] <= ROWS - row["committed_at_fault"]


def test_an_actor_that_dies_with_rows_in_progress_has_them_generated_again(report: dict[str, Any]) -> None:
    assert report["actor-killed"]["regenerated"] > 0


def test_sigterm_commits_what_was_finished_and_ends_soon(report: dict[str, Any]) -> None:
    row = report["sigterm"]
    assert ROWS // 3 <= row["committed_at_fault"] <= ROWS
    assert row["drain_seconds"] < 45
