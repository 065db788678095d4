"""Programs that a user runs, as processes of their own, and routers that they made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}


def run(*command: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=250, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def calibrated(folder: Path, model: Path) -> Path:
    """Routers at depths 2 and 3 of a tiny model of four layers."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {i} of many, and {i * i}"}) + "\n" for i in range(40)))
    done = run(
        ROOT / "jobs" / "calibrate.py", "--model", model, "--prompts", prompts, "--output", folder / "out",
        "--dtype", "float32", "--max-tokens", 12, "--boundaries", "2,3", "--bottleneck", 16, "--num-threads", 1,
    )  # fmt: skip
    assert "boundaries on held-out prompts" in done.stderr
    assert "Suitability" in done.stderr
    return folder / "out"
