"""Faults of processes: drivers, actors and nodes that are killed, told to end, suspended, or meet another."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from bench_fault_runs import MOST_SECONDS, NODE, Bench, is_child, measured, raylet_pid, wait_until

from tide_ray.types import JobError


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

    Its lock is made to look like that of another machine, where only the heartbeat can be seen. Its actor keeps the
    node that it has, so each driver asks for one of the two.
    """
    job = bench.job(name, num_actors=1)
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
