"""``ray job submit`` as the README has it, to a head of its own that asks for a token: on local files and on a bucket.

The head, and so every worker, knows where the object store is; nothing else that is needed for a bucket is shared.
"""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from object_store import S3Server
from ray_start import RayNodes
from tide_ray.data.job_folder import JobFolder
from tide_ray.data.manifest import part_files
from tide_ray.data.object_path import ObjectPath
from tide_ray.data.reading import fetched
from tide_ray.data.storage import storage_path
from tide_ray.data.verify import verify_job

ROOT = Path(__file__).parents[2]
NUM_ROWS = 6
SETTINGS = {"ignore_eos": True, "dtype": "float32", "device": "cpu", "compile": "off", "num_threads": 1}

Submit = Callable[..., tuple[CompletedProcess[str], str]]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def nodes(object_store: S3Server) -> Iterator[RayNodes]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    made = RayNodes(**token, **object_store.environment)
    yield made
    made.close()


@pytest.fixture(scope="module")
def submit(nodes: RayNodes, tiny_llama_folder: Path) -> Submit:
    address = nodes.start_for_jobs(f"ray start --head --port={nodes.port} --num-cpus=2")

    def submit(name: str, *arguments: object, **environment: str) -> tuple[CompletedProcess[str], str]:
        """What ``ray job submit`` gives, and all that it printed."""
        done = nodes.run(
            [
                "-m", "ray.scripts.scripts", "job", "submit", "--address", address, "--submission-id", name,
                "--working-dir", ROOT, "--", "python", "jobs/generate.py", "--model", tiny_llama_folder,
                "--max-tokens", 4, "--ignore-eos", "--dtype", "float32", "--device", "cpu", "--compile", "off",
                "--num-threads", 1, *arguments,
            ],
            **environment,
        )  # fmt: skip
        return done, done.stdout + done.stderr

    return submit


def prompts(num_rows: int) -> str:
    return "".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(num_rows))


def in_bucket(bucket: str, name: str) -> ObjectPath:
    path = storage_path(f"{bucket}/{name}", "output")
    assert isinstance(path, ObjectPath)
    return path


def test_a_submitted_job_runs_once_for_who_has_the_token(submit: Submit, tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    file.write_text(prompts(NUM_ROWS))
    places = ("--prompts", file, "--output", out)

    refused, said = submit("nightly", *places, RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert refused.returncode != 0
    assert "401" in said or "invalid" in said.lower(), said[-3000:]
    assert not out.exists()

    accepted, said = submit("nightly", *places)
    assert accepted.returncode == 0, said[-3000:]
    found = verify_job(out)
    assert found.is_finished
    assert (found.num_expected, found.num_results, found.problems) == (NUM_ROWS, NUM_ROWS, [])
    assert json.loads((out / "run.json").read_text())["generated_tokens"] == 4 * NUM_ROWS

    written = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again, said = submit("nightly", *places)
    assert again.returncode != 0
    assert "nightly already exists" in said, said[-3000:]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == written

    wrong, said = submit("wrong", *places, "--max-tokens", 0)
    assert wrong.returncode == 1
    assert "max_tokens must be at least 1, got 0" in said
    assert "exit code 2" in said, said[-3000:]


def test_a_submitted_job_reads_from_a_bucket_and_writes_to_it(submit: Submit, bucket: str) -> None:
    in_bucket(bucket, "in/prompts.jsonl").write_text(prompts(NUM_ROWS))
    out = in_bucket(bucket, "out")
    done, said = submit("in-a-bucket", "--prompts", f"{bucket}/in/", "--output", out)
    assert done.returncode == 0, said[-3000:]
    assert "not-to-be-seen" not in said
    found = verify_job(out)
    assert found.is_finished
    assert (found.num_expected, found.num_results, found.problems) == (NUM_ROWS, NUM_ROWS, [])
    run = json.loads((out / "run.json").read_text())
    assert (run["generated_tokens"], run["engine"]["device"]) == (4 * NUM_ROWS, "cpu")
    assert not (out / "_tmp").is_dir()


def test_a_job_on_a_bucket_that_is_killed_at_a_third_goes_on_and_has_every_row_once(
    nodes: RayNodes, submit: Submit, bucket: str, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    num_rows = 48
    in_bucket(bucket, "prompts.jsonl").write_text(prompts(num_rows) + "not json\n")
    out = in_bucket(bucket, "out")
    settings: dict[str, Any] = {
        **SETTINGS, "model": str(tiny_llama_folder), "prompts": [f"{bucket}/prompts.jsonl"], "output": str(out),
        "max_tokens": 8, "batch_size": 4, "rows_per_part": 4, "max_num_seqs": 4, "address": nodes.address,
    }  # fmt: skip
    # The engine of the benchmark's driver waits for a file: a tiny model's job would be over before it is killed.
    command = [sys.executable, ROOT / "jobs" / "bench_faults_driver.py", tmp_path / "job.yaml"]
    gate = tmp_path / "gate"
    environment = {**nodes.environment, "TIDE_BENCH_GATE": str(gate), "TIDE_BENCH_HOLD_AFTER": "24"}

    def attempt(**more: Any) -> subprocess.Popen[str]:
        (tmp_path / "job.yaml").write_text(yaml.safe_dump({**settings, **more}))
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    first = attempt()
    deadline = time.monotonic() + 120
    while sum(1 for _ in (out / "data").glob("*.parquet")) < num_rows // 3 // 4:
        assert first.poll() is None, first.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    gate.touch()
    killed = JobFolder.existing(out)
    kept = {path.name: path.stat().version for path in (out / "data").glob("*.parquet")}
    assert killed.finished() is None
    assert len(kept) < num_rows // 4, "it was over before it was killed"

    second = attempt()
    _, said = second.communicate(timeout=200)
    assert second.returncode == 3, said[-3000:]
    assert "resuming: " in said
    found = verify_job(out)
    assert found.is_finished
    assert (found.num_results, found.num_errors, found.problems) == (num_rows, 1, [])
    ids = []
    for path in part_files(out, "data"):
        with fetched(path) as file:
            ids += pq.read_table(file)["row_id"].to_pylist()
    assert len(ids) == len(set(ids)) == num_rows
    now = {path.name: path.stat().version for path in (out / "data").glob("*.parquet")}
    assert kept.items() <= now.items()
    assert json.loads((out / "run.json").read_text())["generated_rows"] <= num_rows - 4 * len(kept)

    for more, what in (({"retry_errors": True}, "trying 1 rejected rows again"), ({}, "nothing to do")):
        again = attempt(**more)
        _, said = again.communicate(timeout=200)
        assert (again.returncode, verify_job(out).problems) == (3, []), said[-3000:]
        assert what in said

    # With other settings it would be another job: that one starts beside it, and both are whole.
    def written() -> dict[str, Any]:
        """All but who owns the output, which everyone who looks at it does for a moment."""
        return {path.key: path.stat() for path in out.rglob("*") if path.name not in ("_lock", "_attempt.json")}

    before = written()
    beside = attempt(max_tokens=3, force_new_run=True)
    _, said = beside.communicate(timeout=200)
    assert beside.returncode == 3, said[-3000:]
    assert f"this one is in {out}-2" in " ".join(said.split())
    found = verify_job(f"{out}-2")
    assert (found.is_finished, found.num_results, found.num_errors, found.problems) == (True, num_rows, 1, [])
    assert json.loads((in_bucket(bucket, "out-2") / "run.json").read_text())["generated_tokens"] == 3 * num_rows
    assert (verify_job(out).problems, written()) == ([], before)
