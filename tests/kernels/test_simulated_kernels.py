"""Every CUDA kernel against its torch reference in Numba's simulator: no GPU, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "simulated"


def test_every_cuda_kernel_equals_its_reference_in_the_simulator() -> None:
    options = ["-q", "-x", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider", "--import-mode=prepend"]
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--confcutdir", str(FOLDER), str(FOLDER)],
        cwd=FOLDER.parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
