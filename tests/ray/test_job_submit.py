"""``ray job submit`` as the README has it, to a head of its own that asks for a token."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from ray_start import RayNodes
from tide_ray.data.verify import verify_job

ROOT = Path(__file__).parents[2]
NUM_ROWS = 6


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    made = RayNodes(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    yield made
    made.close()


@pytest.mark.slow
def test_a_submitted_job_runs_once_for_who_has_the_token(
    nodes: RayNodes, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(NUM_ROWS)))
    address = nodes.start_for_jobs(f"ray start --head --port={nodes.port} --num-cpus=2")

    def submit(name: str, *arguments: object, **environment: str) -> tuple[CompletedProcess[str], str]:
        """What ``ray job submit`` gives, and all that it printed."""
        done = nodes.run(
            [
                "-m", "ray.scripts.scripts", "job", "submit", "--address", address, "--submission-id", name,
                "--working-dir", ROOT, "--", "python", "jobs/generate.py", "--model", tiny_llama_folder,
                "--prompts", prompts, "--output", out, "--max-tokens", 4, "--ignore-eos", "--dtype", "float32",
                "--device", "cpu", "--compile", "off", "--num-threads", 1, *arguments,
            ],
            **environment,
        )  # fmt: skip
        return done, done.stdout + done.stderr

    refused, said = submit("nightly", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert refused.returncode != 0
    assert "401" in said or "invalid" in said.lower(), said[-3000:]
    assert not out.exists()

    accepted, said = submit("nightly")
    assert accepted.returncode == 0, said[-3000:]
    found = verify_job(out)
    assert found.is_finished
    assert (found.num_expected, found.num_results, found.problems) == (NUM_ROWS, NUM_ROWS, [])
    assert json.loads((out / "run.json").read_text())["generated_tokens"] == 4 * NUM_ROWS

    written = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again, said = submit("nightly")
    assert again.returncode != 0
    assert "nightly already exists" in said, said[-3000:]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == written

    wrong, said = submit("wrong", "--max-tokens", 0)
    assert wrong.returncode == 1
    assert "max_tokens must be at least 1, got 0" in said
    assert "exit code 2" in said, said[-3000:]
