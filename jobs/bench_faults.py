"""What faults cost a job: rows lost, doubled and generated again, and the time until rows are committed again.

Every scenario is a job of its own, in processes of its own, on a cluster of two nodes on this machine. Rows are counted
in the files themselves and checked by ``tide-ray verify``. ``regenerated`` is an upper bound: all rows that an engine
was given more than once, those included that only waited in it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_fault_runs import Bench, two_nodes
from bench_fault_scenarios import SCENARIOS
from rich.console import Console
from rich.table import Table

from tide_ray.messages import one_line
from tide_ray.types import JobError, UserError

COLUMNS = (
    "expected", "committed", "rejected", "doubled", "lost", "regenerated", "recovery_seconds", "exit_codes",
)  # fmt: skip


def run_faults(scenarios: list[str], *, num_rows: int, finished_rows: int, **settings: Any) -> dict[str, Any]:
    """Run the scenarios by name, all of them when there are none.

    Args:
        num_rows: prompts of each job, ``finished_rows`` of the one that is run again after it is finished.
        settings: of the jobs.
    """
    for name in scenarios:
        if name not in SCENARIOS:
            raise UserError(f"scenarios must be of {', '.join(SCENARIOS)}, got {name!r}")
    results = []
    defaults = {"num_actors": 2, "batch_size": 8, "rows_per_part": 8, "ignore_eos": True, "num_threads": 1}
    with tempfile.TemporaryDirectory(prefix="faults", ignore_cleanup_errors=True) as scratch, two_nodes() as cluster:
        bench = Bench(cluster, Path(scratch), num_rows, finished_rows, {**defaults, **settings})
        for name in scenarios or SCENARIOS:
            results.append({"scenario": name, **_outcome(bench, name)})
            print(results[-1], file=sys.stderr, flush=True)
    return {**defaults, **settings, "prompts": num_rows, "scenarios": results}


def _outcome(bench: Bench, name: str) -> dict[str, Any]:
    """The counts, or what went wrong: one scenario that fails must not cost the others."""
    try:
        return SCENARIOS[name](bench, name)
    except (JobError, OSError, subprocess.TimeoutExpired) as error:
        return {**dict.fromkeys(COLUMNS), "failed": one_line(error)}
    finally:
        for job in bench.jobs:
            job.end_all()


def print_faults_report(facts: dict[str, Any]) -> None:
    """Print the fault table."""
    table = Table(title=f"{facts['prompts']} rows, {facts['num_actors']} actors on two nodes", title_justify="left")
    table.add_column("scenario")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in facts["scenarios"]:
        if "failed" in row:
            table.add_row(row["scenario"], f"failed: {row['failed']}"[:100])
            continue
        table.add_row(row["scenario"], *(_shown(row[column]) for column in COLUMNS))
    Console(width=140).print(table)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
