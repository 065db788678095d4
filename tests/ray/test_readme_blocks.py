"""Every block of the README is run: here, or by a test that this file names, or not at all for a reason given here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tide_ray.calibrate.sweep_config import SweepConfig

ROOT = Path(__file__).parents[2]
BLOCKS = [
    (kind, block.strip())
    for kind, block in re.findall(
        r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
]
SHELL = [block for kind, block in BLOCKS if kind == "bash"]

RUN_HERE = (
    "python -c 'import json, random",
    "tide-ray evaluate sum-routers",
    "tide-ray generate --exits sum-routers",
)
"""Starts of blocks, in the order of the README; each goes on in the folder that the ones before left."""

RUN_BY_A_TEST = {
    """echo '{"id": "q1",""": "tests/ray/test_generate_job.py",
    "tide-ray generate --num-actors 1 --max-actors 2": "tests/ray/test_pool.py",
    "tide-ray status out": "tests/ray/test_job_resume.py",
    "tide-ray generate --policy static": "tests/ray/test_readme.py",
    "tide-ray report tide-output": "tests/ray/test_readme.py",
    "# 1. At which depths": "tests/ray/test_readme.py",
    "tide-ray generate --prompts prompts.jsonl --keep-columns category": "tests/ray/test_exits_job.py",
    "tide-ray query out-early": "tests/ray/test_readme.py",
    "tide-ray calibrate --model demo": "tests/ray/test_sweep.py",
    "cat > sweep.yaml": "tests/ray/test_sweep.py",
    "tide-ray generate --exits routers --mode verified": "tests/ray/test_exits_job.py",
    "python jobs/benchmark.py exits routers": "tests/engine/test_exit_benchmarks.py",
    "python jobs/benchmark.py verified routers": "tests/engine/test_exit_benchmarks.py",
    "python jobs/benchmark.py few-shot": "tests/unit/test_few_shot.py",
    'pip install -e ".[bench]"': "tests/ray/test_benchmark.py",
    'pip install -e ".[docs]"': "tests/unit/test_reference.py",
    'echo \'{"prompt": "Name three colours."}\'': "tests/ray/test_job_submit.py",
    'pip install -e ".[s3]"': "tests/object_store.py",
    "tide-ray query s3://tide/out": "tests/unit/test_object_store_analytics.py",
    "curl -s localhost:8080/metrics": "tests/ray/test_metrics.py",
    "ray job submit": "tests/ray/test_job_submit.py",
    "tide-ray serve": "tests/serve/ray/test_serve_command.py",
    "tide-ray api-key": "tests/serve/test_keys.py",
    "tide-ray batch": "tests/serve/ray/test_batch.py",
    'pip install -e ".[cuda]" && tide-ray doctor': "tests/unit/test_doctor.py",
}
"""The same command with a model and sizes of the test's own."""

NOT_RUN = {
    "pip install -e . && tide-ray generate": "CI installs with its own line; the job is run by test_readme.py",
    "python3 -m venv .venv": "CI makes its own environment from nothing, by the same line",
    'pip install -e ".[test]" && pytest -n 2': "it is CI itself",
    'pip install -e ".[test,cuda]" && pytest tests/gpu': "needs a GPU",
    "docker build": "needs a Docker daemon; the file is read by tests/unit/test_dockerfile.py",
    "ray get-auth-token": "needs a cloud account; tests/ray/test_ray_up.py runs the local cluster's commands",
    "kubectl create secret generic tide-ray-token": "needs Kubernetes; see tests/unit/test_kuberay.py",
    "kubectl create secret generic tide-api-keys": "needs Kubernetes; see tests/unit/test_kuberay.py",
}

SMALL = """#!/bin/sh
# tide-ray with sizes that a test has time for: the last of equal flags counts.
case "$1" in
calibrate) set -- "$@" --num-prompts 40 --max-tokens 8 --boundaries 20 ;;
certify) set -- "$@" --num-prompts 24 --num-ordering 8 --max-tokens 8 --epsilons 0.9 ;;
evaluate) set -- "$@" --num-prompts 8 --max-tokens 8 ;;
generate) case "$*" in *sum-routers*) set -- "$@" --limit 6 --max-tokens 8 --max-disagreement 0.9 ;; esac ;;
esac
exec "{python}" -m tide_ray.cli "$@"
"""


def starting(start: str) -> list[str]:
    return [block for block in SHELL if block.startswith(start)]


def test_no_block_is_left_out() -> None:
    for block in SHELL:
        starts = [start for start in (*RUN_HERE, *RUN_BY_A_TEST, *NOT_RUN) if block.startswith(start)]
        assert starts, f"say in this file where this block is run:\n{block}"
    for start in (*RUN_HERE, *RUN_BY_A_TEST, *NOT_RUN):
        assert starting(start), f"no such block: {start}"
    assert all((ROOT / file).exists() for file in RUN_BY_A_TEST.values())
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", ""}  # python's are run by test_readme.py


def test_the_sweeps_file_is_one() -> None:
    [block] = starting("cat > sweep.yaml")
    settings = yaml.safe_load(block.split("\n", 1)[1].partition("\nEOF")[0])
    assert [model.name for model in SweepConfig.build(settings).models] == ["demo", "demo-exact"]


@pytest.mark.slow
def test_from_nothing_to_a_certified_run_and_its_report(tmp_path: Path, demo_path: Path) -> None:
    """The quick start and what goes on from it, by a shell, as they stand but for smaller sizes."""
    script = tmp_path / "bin" / "tide-ray"
    script.parent.mkdir()
    script.write_text(SMALL.replace("{python}", sys.executable))
    script.chmod(0o755)
    path = f"{script.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    for start in RUN_HERE:
        for block in starting(start):
            done = subprocess.run(
                ["bash", "-eu", "-c", block],
                cwd=tmp_path,
                env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    facts = json.loads((tmp_path / "out-sums" / "run.json").read_text())
    assert facts["engine"]["exits"]["certificate"]["epsilon"] == 0.9
    assert (tmp_path / "tide-report.html").stat().st_size > 10_000
    assert (tmp_path / "evaluation.html").exists()
    assert json.loads((tmp_path / "out-watched" / "run.json").read_text())["drift"]
