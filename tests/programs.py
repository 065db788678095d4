"""What users run as programs: their commands in this process, programs of their own, and routers that they made.

A program of its own takes seconds to import torch. A command is the object that its program calls; how programs start
and end, and that nothing else than their own lines gets to stderr, is tested where one is run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchmark
import torch
import typer
from typer.testing import CliRunner, Result

from tide_ray import cli

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """A Python command line, without ``python``, as a program."""
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=390, env=ENVIRONMENT, check=False
    )


def invoke(app: typer.Typer, *arguments: object) -> Result:
    """A command in this process. Raises what it did not make an exit code of."""
    num_threads = torch.get_num_threads()
    done = CliRunner().invoke(app, [*map(str, arguments)])
    torch.set_num_threads(num_threads)  # commands take all cores, or as many as they are told
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def benchmarked(*arguments: object) -> Result:
    """A command of ``jobs/benchmark.py``, which may fail."""
    return invoke(benchmark.app, *arguments)


def measured(*arguments: object) -> dict[str, Any]:
    """What a benchmark gives in the last line that it prints; all that it printed is under ``printed``."""
    done = benchmarked(*arguments)
    assert done.exit_code == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "printed": done.stdout}


def succeeding(*arguments: object) -> Result:
    """A command of ``tide-ray``."""
    done = invoke(cli.app, *arguments)
    assert done.exit_code == 0, done.output
    return done


def calibrated(folder: Path, model: Path) -> Path:
    """Routers at depths 2 and 3 of a tiny model of four layers."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {i} of many, and {i * i}"}) + "\n" for i in range(40)))
    done = succeeding(
        "calibrate", "--model", model, "--prompts", prompts, "--output", folder / "out", "--dtype", "float32",
        "--max-tokens", 12, "--boundaries", "2,3", "--bottleneck", 16, "--num-threads", 1,
    )  # fmt: skip
    assert "boundaries on held-out prompts" in done.stderr
    assert "Suitability" in done.stderr
    return folder / "out"
