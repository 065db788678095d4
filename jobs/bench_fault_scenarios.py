"""The faults: each takes a bench, has its fault strike a job of its own, and returns the counts of ``measured``.

Those of processes are in ``bench_fault_processes``; here are those of rows, memory, disks and settings.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

from bench_fault_processes import (
    actor_killed,
    driver_killed,
    driver_suspended,
    raylet_killed,
    terminated,
    two_drivers,
)
from bench_fault_runs import HANG, MOST_RESIDENTS, MOST_SECONDS, POISON, STORE_BYTES, Bench, measured, spilled_bytes

from tide_ray.data.verify import verify_job
from tide_ray.types import JobError


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
