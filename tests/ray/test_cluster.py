"""The Ray that a job starts on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ASK_A_WORKER = """
import os, ray
from tide_ray.data.cluster import connected
with connected(None):
    print("niceness", ray.get(ray.remote(lambda: os.nice(0)).remote()))
"""


@pytest.mark.slow
def test_engines_are_as_nice_as_the_driver_so_that_daemons_do_not_interrupt_them() -> None:
    """Ray's default put the engine at nice 15, below every process of Ray that wakes a hundred times a second."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_worker_niceness"}
    done = subprocess.run(
        [sys.executable, "-c", ASK_A_WORKER],
        env={**environment, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert f"niceness {os.nice(0)}" in done.stdout
