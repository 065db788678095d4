"""The faults: each takes a bench, has its fault strike a job of its own, and returns the counts of ``measured``."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from bench_fault_runs import (
    HANG,
    MOST_RESIDENTS,
    MOST_SECONDS,
    NODE,
    POISON,
    STORE_BYTES,
    Job,
    is_child,
    raylet_pid,
    spilled_bytes,
    wait_until,
)

from tide_ray.data.verify import verify_job
from tide_ray.types import JobError


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


def driver_killed(share: float) -> Callable[[Bench, str], dict[str, Any]]:
    def scenario(bench: Bench, name: str) -> dict[str, Any]:
        job = bench.job(name)
        job.hold_at(int(bench.num_rows * share))
        first = job.start()
        job.wait_for_rows(int(bench.num_rows * share), first)
        job.kill(first)
        job.go_on()
        at_kill = job.committed()
        again = job.start()
        recovery = job.seconds_to_next_part(again)
        return measured(job, [job.end(again)], recovery, committed_at_fault=at_kill)

    return scenario


def actor_killed(bench: Bench, name: str) -> dict[str, Any]:
    job = bench.job(name)
    job.hold_at(bench.num_rows // 4)
    process = job.start()
    job.wait_for_rows(bench.num_rows // 4, process)
    wait_until(lambda: bool(job.busy_actors()), "an actor had rows in progress", process)
    os.kill(job.busy_actors()[0], signal.SIGKILL)
    job.go_on()
    recovery = job.seconds_to_next_part(process)
    return measured(job, [job.end(process)], recovery)


def raylet_killed(bench: Bench, name: str) -> dict[str, Any]:
    """The second node dies with the actor on it. Another node takes its place for the scenarios that follow."""
    job = bench.job(name)
    job.hold_at(bench.num_rows // 4)
    (node,) = bench.cluster.worker_nodes
    process = job.start()
    job.wait_for_rows(bench.num_rows // 4, process)
    num_there = sum(is_child(pid, raylet_pid(node)) for pid in job.busy_actors())
    os.kill(raylet_pid(node), signal.SIGKILL)
    job.go_on()
    try:
        recovery = job.seconds_to_next_part(process)
        return measured(job, [job.end(process)], recovery, busy_actors_there=num_there)
    finally:
        job.end_all()
        bench.cluster.remove_node(node, allow_graceful=False)
        bench.cluster.add_node(**NODE)


def deadly_row(word: str, **settings: Any) -> Callable[[Bench, str], dict[str, Any]]:
    def scenario(bench: Bench, name: str) -> dict[str, Any]:
        rows = [{"prompt": f"{word if i == 5 else 'fine'} {i}"} for i in range(bench.num_rows)]
        job = bench.job(name, rows, **settings)
        start = time.monotonic()
        code = job.run()
        return measured(job, [code], None, rejected=1, job_seconds=round(time.monotonic() - start, 1))

    return scenario


def bad_rows(bench: Bench, name: str) -> dict[str, Any]:
    """Every twentieth row is bad in one of five ways. First with a limit that they exceed, then without."""
    kinds: list[dict[str, Any]] = [
        {"prompt": "too long " * 5000},
        {"prompt": ""},
        {"prompt": 17},
        {"prompt": "x", "sampling_params": {"temperature": "hot"}},
        {"messages": [{"role": "user", "content": ["no text"]}]},
    ]
    rows: list[dict[str, Any]] = [{"prompt": f"fine {i}"} for i in range(bench.num_rows)]
    bad = range(0, bench.num_rows, 20)
    for number, index in enumerate(bad):
        rows[index] = kinds[number % len(kinds)]
    job = bench.job(name, rows)
    codes = [job.run(max_errors=0.02), job.run()]
    return measured(job, codes, None, rejected=len(bad))


def terminated(bench: Bench, name: str) -> dict[str, Any]:
    job = bench.job(name)
    job.hold_at(bench.num_rows // 3)
    process = job.start()
    job.wait_for_rows(bench.num_rows // 3, process)
    num_begun = job.reported()["started"]
    start = time.monotonic()
    process.terminate()
    wait_until(lambda: any(job.out.glob("_tmp/*/drain*")), "the job asked its workers to stop", process)
    job.go_on()
    code = job.end(process)
    seconds, num_committed = time.monotonic() - start, job.committed()
    again = job.start()
    recovery = job.seconds_to_next_part(again)
    codes = [code, job.end(again)]
    job.num_started += num_begun
    return measured(job, codes, recovery, drain_seconds=round(seconds, 2), committed_at_fault=num_committed)


def two_drivers(bench: Bench, name: str) -> dict[str, Any]:
    job = bench.job(name)
    job.hold_at(1)
    first = job.start()
    job.wait_for_rows(1, first)
    second = job.start()
    _, message = second.communicate(timeout=MOST_SECONDS)
    job.go_on()
    if "is owned by process" not in message:
        raise JobError(f"{name}: the second driver said {message!r}")
    return measured(job, [job.end(first), second.returncode], None)


def driver_suspended(bench: Bench, name: str) -> dict[str, Any]:
    """A driver stands still for longer than its lease, and goes on when another has taken the folder.

    Its lock is made to look like that of another machine, where only the heartbeat can be seen.
    """
    job = bench.job(name)
    job.hold_at(bench.num_rows // 3)
    first = job.start()
    job.wait_for_rows(bench.num_rows // 3, first)
    os.kill(first.pid, signal.SIGSTOP)
    job.go_on()
    num_begun = job.reported()["started"]
    lock = job.out / "_lock"
    lock.write_text(json.dumps({**json.loads(lock.read_text(encoding="utf-8")), "host": "elsewhere"}), encoding="utf-8")
    second = job.start()
    recovery = job.seconds_to_next_part(second)
    os.kill(first.pid, signal.SIGCONT)
    codes = [job.end(second), job.end(first)]
    if "was taken over by another attempt" not in job.last_error:
        raise JobError(f"{name}: the first driver said {job.last_error!r}")
    job.num_started += num_begun
    return measured(job, codes, recovery)


def object_store_spilled(bench: Bench, name: str) -> dict[str, Any]:
    """Rows carry a column of more bytes than the nodes' object stores hold."""
    filler = "x" * (STORE_BYTES * 3 // bench.num_rows)
    rows = [{"prompt": f"fine {i}", "filler": f"{i}{filler}"} for i in range(bench.num_rows)]
    job = bench.job(name, rows, keep_columns=["filler"], max_tokens=2)
    before = spilled_bytes(bench.cluster)
    code = job.run()
    spilled = spilled_bytes(bench.cluster) - before
    if not spilled:
        raise JobError(f"{name}: nothing was spilled")
    return measured(job, [code], None, spilled_bytes=spilled)


def changed_fingerprint(bench: Bench, name: str) -> dict[str, Any]:
    job = bench.job(name, [{"prompt": f"fine {i}"} for i in range(16)])
    codes = [job.run(), job.run(max_tokens=3)]
    if "sampling was" not in job.last_error:
        raise JobError(f"{name}: the changed job said {job.last_error!r}")
    codes.append(job.run(max_tokens=3, force_new_run=True))
    beside = verify_job(job.out.with_name("out-2"))
    if beside.problems or beside.num_results != 16:
        raise JobError(f"{name}: the run beside it is not complete")
    return measured(job, codes, None)


def out_of_memory(bench: Bench, name: str) -> dict[str, Any]:
    """More than two resident sequences ask for more memory than there is; engines start with eight."""
    job = bench.job(name, max_num_seqs=8)
    job.environment[MOST_RESIDENTS] = "2"
    code = job.run()
    facts = json.loads((job.out / "run.json").read_text(encoding="utf-8"))
    if facts["engine"]["max_num_seqs"] != 2:
        raise JobError(f"{name}: the engine has {facts['engine']['max_num_seqs']} resident sequences")
    return measured(job, [code], None)


def disk_full(bench: Bench, name: str) -> dict[str, Any]:
    """The output lies on a file system that fills up; it gets larger, and the job runs again. On a Ray of its own."""
    job = bench.job(name, address=None, num_actors=1, batch_size=4, rows_per_part=4)
    job.out.mkdir()
    out, kept = shlex.quote(str(job.out)), shlex.quote(str(job.folder / "kept"))
    script = f"""
        set -u
        mount -t tmpfs -o size={bench.num_rows}k tmpfs {out} || exit 99
        "$@"; first=$?
        find {out}/data -name '*.parquet' | wc -l
        mount -o remount,size=256m {out}
        "$@"; second=$?
        cp -a {out}/. {kept}
        echo $first $second
    """
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *job.command()],
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    if done.returncode:
        raise JobError(f"{name}: {done.stderr[-500:]}")
    num_parts, *codes = map(int, done.stdout.split())
    shutil.copytree(job.folder / "kept", job.out, dirs_exist_ok=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return measured(job, codes, None, parts_at_fault=num_parts, said=said)


def finished_again(bench: Bench, name: str) -> dict[str, Any]:
    rows = [{"prompt": f"Count to {i}."} for i in range(bench.finished_rows)]
    job = bench.job(name, rows, max_tokens=4, batch_size=64, rows_per_part=256)
    codes = [job.run()]
    facts = (job.out / "run.json").read_text(encoding="utf-8")
    before = job.parts()
    start = time.monotonic()
    codes.append(job.run())
    seconds = time.monotonic() - start
    if job.parts() != before or (job.out / "run.json").read_text(encoding="utf-8") != facts:
        raise JobError(f"{name}: the second run has written something")
    job.num_started = len(rows)
    return measured(job, codes, None, second_run_seconds=round(seconds, 2))


SCENARIOS: dict[str, Callable[[Bench, str], dict[str, Any]]] = {
    "driver-killed-at-a-third": driver_killed(1 / 3),
    "driver-killed-at-two-thirds": driver_killed(2 / 3),
    "actor-killed": actor_killed,
    "raylet-killed": raylet_killed,
    "sigterm": terminated,
    "two-drivers": two_drivers,
    "poison-row": deadly_row(POISON),
    "bad-rows": bad_rows,
    "disk-full": disk_full,
    "changed-fingerprint": changed_fingerprint,
    "finished-again": finished_again,
    "hung-engine": deadly_row(HANG, step_timeout=3.0),
    "out-of-memory": out_of_memory,
    "driver-suspended": driver_suspended,
    "object-store-spilled": object_store_spilled,
}
