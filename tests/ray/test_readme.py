"""What the README tells a new user to run, run."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tide_ray.cli import app

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BENCHMARK = Path(__file__).parents[2] / "jobs" / "benchmark.py"
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
"""The one that asks a server is run beside one, in tests/serve/ray."""


@pytest.fixture(scope="module")
def after_the_demo_job(tmp_path_factory: pytest.TempPathFactory, demo_path: Path) -> Path:
    """A folder where a little of the demo job has run, and of the one that stops at depth 24."""
    folder = tmp_path_factory.mktemp("demo")
    job = [sys.executable, "-m", "tide_ray.cli", "generate", "--limit", "3", "--max-tokens", "4"]
    static = ["--policy", "static", "--exit-layer", "24", "--output", "out-24", "--keep-columns", "category"]
    for options in ([], static):
        subprocess.run([*job, *options], cwd=folder, check=True, timeout=300)
    return folder


@pytest.mark.slow
def test_every_question_is_answered(after_the_demo_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(after_the_demo_job)
    questions = re.findall(r'^tide-ray (query (?!s3://)[^"\n]*"[^"]*"|report tide-output\b)', README, re.MULTILINE)
    assert len(questions) >= 15
    answers = {}
    here = [one for one in questions if "out-sums" not in one]  # the quick start's, in test_readme_blocks
    for question in (one.replace("out-early", "out-24") for one in here):  # its tokens all leave early
        done = CliRunner().invoke(app, [*shlex.split(question), *(["--format", "json"] if "query" in question else [])])
        assert done.exit_code == 0, f"{question}\n{done.output}"
        assert done.stdout or "FROM errors" in question, question
        answers[question] = done.stdout
    assert (after_the_demo_job / "tide-report.html").exists()
    saved = next(answer for question, answer in answers.items() if "AS saved" in question)
    assert json.loads(saved) == {"run": "out-24", "saved": pytest.approx(1 - 24 / 30)}


@pytest.mark.slow
def test_python_blocks_run_after_the_demo_job(after_the_demo_job: Path) -> None:
    assert len(PYTHON_BLOCKS) >= 6
    for block in (block for block in PYTHON_BLOCKS if "import openai" not in block):
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=after_the_demo_job,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"
        assert done.stdout.strip(), f"printed nothing:\n{block}"


def test_every_flag_that_the_readme_names_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))  # where python looks when it runs the script itself
    groups = [typer.main.get_group(one) for one in (runpy.run_path(str(BENCHMARK))["app"], app)]
    options = {
        name.removeprefix("--").removeprefix("no-")
        for group in groups
        for command in group.commands.values()
        for parameter in command.params
        for name in parameter.opts
    }
    flags = set(re.findall(r"(?<![\w-])--(?:no-)?([a-z][a-z-]+)", README))
    of_ray_kubectl_and_pytest = {
        "working-dir",
        "generate",
        "metrics-export-port",
        "from-literal",
        "submission-id",
        "dist",
    }
    assert flags - of_ray_kubectl_and_pytest <= {*options, "help"}
    assert len(flags) > 10
