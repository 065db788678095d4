"""What the fault benchmark runs: a Ray cluster of two nodes on this machine, and jobs in processes of their own."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from tide_ray.data.reports import Reports
from tide_ray.data.verify import verify_job
from tide_ray.types import JobError

DRIVER = Path(__file__).with_name("bench_faults_driver.py")
POISON, HANG = "POISON", "HANG"  # see there
MOST_RESIDENTS, GATE, HOLD_AFTER = "TIDE_BENCH_MOST_RESIDENTS", "TIDE_BENCH_GATE", "TIDE_BENCH_HOLD_AFTER"
POLL_SECONDS = 0.02
MOST_SECONDS = 240.0
STORE_BYTES = 80 << 20  # of each node's object store; Ray takes no less than 75 MiB
# Of three CPUs an actor takes two. Of two it would take one, and one that moves in after a node's death the other, so
# that none was left for reads and writes.
NODE: dict[str, Any] = {"num_cpus": 3, "object_store_memory": STORE_BYTES}
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
}


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster of a head and one more node, for this process and its children alone."""
    # Ray reads them when it is imported, which nothing has done yet.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"RAY_worker_niceness": "0"}
    # Sockets lie there, whose paths must be short, and so does the note of which cluster runs on this machine.
    with tempfile.TemporaryDirectory(prefix="faults", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        from ray.cluster_utils import Cluster

        head = {**NODE, "include_dashboard": False, "_system_config": HEALTH_CHECKS}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(**NODE)
            yield cluster
        finally:
            cluster.shutdown()


def raylet_pid(node: Any) -> int:
    """The process of a cluster node's raylet."""
    from ray._private import ray_constants

    pid: int = node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process.pid
    return pid


def spilled_bytes(cluster: Any) -> int:
    """Bytes that the nodes' object stores have written to disk since they started, as ``ray memory`` has them."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    total: int = get_memory_info_reply(get_state_from_address(cluster.address)).store_stats.spilled_bytes_total
    return total


def is_child(pid: int, parent: int) -> bool:
    """Whether the process runs and is a child of that one: a Ray worker is its node's raylet's."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return int(stat.rpartition(")")[2].split()[1]) == parent


def wait_until(condition: Callable[[], bool], what: str, process: subprocess.Popen[str] | None = None) -> None:
    """Poll until ``condition`` holds. Raises JobError if it takes too long, or ``process`` ends before."""
    deadline = time.monotonic() + MOST_SECONDS
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            said = process.stderr.read()[-300:] if process.stderr is not None else ""
            raise JobError(f"the job ended with exit code {process.returncode} before {what}: {said}")
        if time.monotonic() > deadline:
            raise JobError(f"{MOST_SECONDS:g} s have passed before {what}")
        time.sleep(POLL_SECONDS)


@dataclass(slots=True)
class Job:
    """A job in a folder of its own: its input, settings, and every attempt at it."""

    folder: Path
    prompts: list[dict[str, Any]]
    settings: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    num_started: int = 0  # rows that engines were given, over attempts that are over
    last_error: str = ""
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        path = self.folder / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.prompts), encoding="utf-8")
        self.settings = {**self.settings, "prompts": [str(path)], "output": str(self.out)}

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def gate(self) -> Path:
        return self.folder / "gate"

    def hold_at(self, num_rows: int) -> None:
        """Let the engines wait, once so many rows can be committed and before all are answered, for ``go_on``."""
        batch = self.settings["batch_size"]
        each = -(-num_rows // (self.settings["num_actors"] * batch)) * batch + batch  # a batch may not be complete
        self.environment |= {GATE: str(self.gate), HOLD_AFTER: str(each)}

    def go_on(self) -> None:
        self.gate.touch()

    def command(self, **settings: Any) -> list[str]:
        """What starts an attempt, with other settings if need be."""
        path = self.folder / f"job-{time.monotonic_ns()}.yaml"
        path.write_text(yaml.safe_dump({**self.settings, **settings}), encoding="utf-8")
        return [sys.executable, str(DRIVER), str(path)]

    def start(self, **settings: Any) -> subprocess.Popen[str]:
        """Begin an attempt."""
        process = subprocess.Popen(
            self.command(**settings),
            env={**os.environ, **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def end_all(self) -> None:
        """Leave no attempt behind, whatever state it is in."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def end(self, process: subprocess.Popen[str]) -> int:
        """Wait for an attempt to end by itself; its exit code."""
        _, self.last_error = process.communicate(timeout=MOST_SECONDS)
        if (facts := self.out / "run.json").exists() and process.returncode in (0, 3):
            self.num_started += json.loads(facts.read_text(encoding="utf-8")).get("started_rows", 0)
        return process.returncode

    def run(self, **settings: Any) -> int:
        """A whole attempt; its exit code."""
        return self.end(self.start(**settings))

    def kill(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL the attempt's driver, counting first what its engines have begun."""
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        self.num_started += self.reported()["started"]

    def attempts(self) -> list[Path]:
        return [path for path in (self.out / "_tmp").glob("*") if path.is_dir()]

    def reported(self) -> dict[str, Any]:
        """What the actors of the attempt that is running, or was killed, have reported."""
        folder = next(iter(self.attempts()), self.out / "none")
        return Reports(str(folder / "reports")).totals()

    def busy_actors(self) -> list[int]:
        """Processes of actors that have rows in progress."""
        pids = []
        for path in (path for attempt in self.attempts() for path in (attempt / "reports").glob("*.json")):
            totals = json.loads(path.read_text(encoding="utf-8"))["totals"]
            if totals["started"] > totals["rows"]:
                pids.append(int(path.name.partition("-")[0]))
        return pids

    def parts(self) -> dict[str, int]:
        """Rows of each committed part, errors included."""
        paths = [path for kind in ("data", "errors") for path in (self.out / kind).glob("*.parquet")]
        return {str(path): pq.read_metadata(path).num_rows for path in paths}

    def committed(self) -> int:
        """Rows in committed parts."""
        return sum(self.parts().values())

    def wait_for_rows(self, count: int, process: subprocess.Popen[str]) -> None:
        """Until so many rows are committed."""
        wait_until(lambda: self.committed() >= count, f"{count} rows were committed", process)

    def seconds_to_next_part(self, process: subprocess.Popen[str]) -> float:
        """Wait for a part that is not there now."""
        start, before = time.monotonic(), set(self.parts())
        wait_until(lambda: not set(self.parts()) <= before, "the next part was committed", process)
        return time.monotonic() - start


@dataclass(slots=True)
class Bench:
    """What all scenarios share."""

    cluster: Any
    scratch: Path
    num_rows: int
    finished_rows: int
    settings: dict[str, Any]
    jobs: list[Job] = field(default_factory=list)

    def job(self, name: str, prompts: list[dict[str, Any]] | None = None, **settings: Any) -> Job:
        rows = prompts or [{"prompt": f"Say something about the number {i}."} for i in range(self.num_rows)]
        settings = {**self.settings, "address": self.cluster.address, **settings}
        job = Job(self.scratch / name, rows, settings)
        self.jobs.append(job)
        return job


def measured(
    job: Job, exit_codes: list[int], recovery: float | None, *, rejected: int = 0, **more: Any
) -> dict[str, Any]:
    """The counts of a job that is over. Raises JobError if ``tide-ray verify`` finds anything wrong."""
    ids: Counter[str] = Counter()
    counts = dict.fromkeys(("data", "errors"), 0)
    for kind in counts:
        for path in (job.out / kind).glob("*.parquet"):
            rows = pq.read_table(path, columns=["row_id"], partitioning=None)["row_id"].to_pylist()
            counts[kind] += len(rows)
            ids.update(rows)
    if problems := verify_job(job.out).problems:
        raise JobError(f"{job.folder.name}: {problems[0]}")
    if counts["errors"] != rejected:
        raise JobError(f"{job.folder.name}: {counts['errors']} rows are rejected, {rejected} should be")
    expected = len(job.prompts)
    return {
        "expected": expected,
        "committed": sum(counts.values()),
        "rejected": counts["errors"],
        "doubled": sum(count - 1 for count in ids.values()),
        "lost": expected - len(ids),
        "regenerated": max(job.num_started - expected, 0),
        "recovery_seconds": None if recovery is None else round(recovery, 2),
        "exit_codes": exit_codes,
        **more,
    }
