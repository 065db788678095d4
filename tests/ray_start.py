"""Ray for tests: in this process, and nodes by ``ray start``, with session folders and ports of their own."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.data import DataContext
from ray.scripts.scripts import start

from ports import free_port

OF_OTHERS = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR")


def check_ray_start(command: str) -> dict[str, Any]:
    """The options of a command line ``ray start ...``; nothing starts. Raises click's errors for an unknown one."""
    program, verb, *arguments = shlex.split(command)
    assert (program, verb) == ("ray", "start")
    return start.make_context("ray start", arguments).params


def start_local_ray() -> None:
    """Two CPUs and two fake GPUs, for this process."""
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=200 * 2**20,
    )
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = 90


class RayNodes:
    """Nodes on this machine: the first is the head.

    Args:
        for_nodes: environment of the nodes alone.
        environment: theirs and that of what ``run`` runs.
    """

    def __init__(self, for_nodes: Mapping[str, str] | None = None, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tide", dir="/tmp"))  # sockets lie in it, and need short paths
        self.port, self.dashboard_port = free_port(), free_port()
        self.environment = {name: value for name, value in os.environ.items() if name not in OF_OTHERS} | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **environment,
        }
        self._for_nodes = dict(for_nodes or {})
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, command: str) -> None:
        """Run ``ray start ...`` in the foreground, and wait until the head can be reached."""
        is_head = "--head" in command
        own = f" --temp-dir={self.folder}/ray --dashboard-port={self.dashboard_port}" if is_head else ""
        command += f"{own} --dashboard-agent-listen-port={free_port()}"
        command += " --block --node-ip-address=127.0.0.1 --object-store-memory=100000000"
        log = self.folder / f"node-{len(self._processes)}.log"
        with log.open("wb") as file:
            environment = {**self.environment, **self._for_nodes}
            self._processes.append(
                subprocess.Popen(shlex.split(command), env=environment, stdout=file, stderr=subprocess.STDOUT)
            )
        if is_head:
            self._wait_for(self.port)

    def start_for_jobs(self, command: str) -> str:
        """Like ``start`` for a head, and wait for its dashboard. Returns the address that ``ray job`` takes."""
        self.start(command)
        self._wait_for(self.dashboard_port)
        return f"http://127.0.0.1:{self.dashboard_port}"

    def run(self, command: Sequence[object], **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a Python command line, without ``python``."""
        return subprocess.run(
            [sys.executable, *map(str, command)],
            env={**self.environment, **environment},
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip

    def close(self) -> None:
        """End all nodes, those too that an autoscaler made, which nobody else ends."""
        mine = [process for process in psutil.process_iter(["cmdline"]) if self._is_mine(process)]
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(timeout=5)  # of the 30 s that Ray takes to drain a node; nothing is left to lose
            except subprocess.TimeoutExpired:
                process.kill()
        for left in mine:
            if left.is_running():
                left.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_for(self, port: int) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                logs = [log.read_text() for log in self.folder.glob("node-*.log")]
                assert time.monotonic() < deadline, f"nobody listens on {port}: {logs}"
                time.sleep(0.5)

    def _is_mine(self, process: psutil.Process) -> bool:
        return any(str(self.folder) in part for part in process.info["cmdline"] or ())
