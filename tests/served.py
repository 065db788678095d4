"""``tide-ray serve`` as a process of its own, with a tiny model."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil

from ports import free_port
from serving import ENGINE
from tide_ray.serve.keys import new_key, stored

KEY = new_key()
AUTH = {"authorization": f"Bearer {KEY}"}
READY_SECONDS = 180


@dataclass
class Served:
    """A running command."""

    process: subprocess.Popen[bytes]
    url: str
    model: str
    scratch: Path

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, timeout=60, **{"max_retries": 0, **options})

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, timeout=60, max_retries=0)

    def replicas(self) -> list[int]:
        """Processes of the model's replicas."""
        return self._processes(f"TideModel:{self.model}")

    def fronts(self) -> list[int]:
        """Processes of the front's replicas."""
        return self._processes("TideFront")

    def _processes(self, name: str) -> list[int]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if name in " ".join(process.cmdline()):
                    found.append(process.pid)
        return sorted(found)


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Served]:
    """Start the command with a tiny model, wait until it says that it is ready, and end it."""
    scratch = Path(tempfile.mkdtemp(prefix="tide-serve-"))  # short, as Ray's sockets lie in it
    keys = scratch / "keys"
    keys.write_text(stored("tester", KEY) + "\n")
    port, model = free_port(), f"tiny-{uuid.uuid4().hex[:8]}"
    engine = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items() if name != "page_size"]
    command = [sys.executable, "-m", "tide_ray.cli", "serve", f"{model}={folder}", "--port", str(port), *engine]
    environment = {**os.environ, "RAY_TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    told = scratch / "stderr"
    with told.open("w") as file:
        process = subprocess.Popen([*command, "--api-keys-file", str(keys), *flags], stderr=file, env=environment)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while "serving " not in told.read_text():
            assert process.poll() is None, told.read_text()
            assert time.monotonic() < deadline, told.read_text()
            time.sleep(0.2)
        yield Served(process, f"http://127.0.0.1:{port}", model, scratch)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=90)
        if process.poll() is None:
            process.kill()
            process.wait()
        shutil.rmtree(scratch, ignore_errors=True)
