"""What the README tells a new user to run, run."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tide_ray.calibrate.config import CalibrationConfig, CertificationConfig, EvaluationConfig
from tide_ray.calibrate.sweep_config import Resources, SweepConfig
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.serve.settings import ServeSettings

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BENCHMARK = Path(__file__).parents[2] / "jobs" / "benchmark.py"
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
"""The one that asks a server is run beside one, in tests/serve."""


@pytest.mark.slow
def test_python_blocks_run_after_the_demo_job(tmp_path: Path, demo_path: Path) -> None:
    job = [sys.executable, "-m", "tide_ray.cli", "generate", "--limit", "3", "--max-tokens", "4"]
    subprocess.run(job, cwd=tmp_path, check=True, timeout=300)
    assert len(PYTHON_BLOCKS) >= 3
    for block in (block for block in PYTHON_BLOCKS if "import openai" not in block):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"
        assert done.stdout.strip(), f"printed nothing:\n{block}"


def test_every_flag_that_the_readme_names_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))  # where python looks when it runs the script itself
    commands = typer.main.get_group(runpy.run_path(str(BENCHMARK))["app"]).commands.values()
    benchmark_options = {parameter.name for command in commands for parameter in command.params}
    flags = set(re.findall(r"(?<![\w-])--(?:no-)?([a-z][a-z-]+)", README))
    others = {"help", "config", "file"}  # no settings
    others |= {
        "working-dir",
        "generate",
        "metrics-export-port",
        "from-literal",
        "submission-id",
    }  # of ray and of kubectl
    settings = (GenerateJobConfig, CalibrationConfig, CertificationConfig, EvaluationConfig)
    settings += (SweepConfig, Resources, ServeSettings)
    fields = {*benchmark_options, *(name for config in settings for name in config.model_fields)}
    assert flags - others <= {name.replace("_", "-") for name in fields}
    assert len(flags) > 10
