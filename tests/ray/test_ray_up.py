"""Cluster files for ``ray up`` against Ray's own schema, and their commands as far as one machine goes."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from ray_start import check_ray_start

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "cluster").glob("ray-up-*.yaml"))
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def config_of(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def ray_starts(config: dict[str, Any], which: str) -> list[str]:
    commands = [part.strip() for line in config[which] for part in line.split(";")]
    return [command for command in commands if command.startswith("ray start")]


def test_there_is_a_file_for_each_provider() -> None:
    assert {config_of(file)["provider"]["type"] for file in FILES} == {"local", "aws", "gcp"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_are_what_ray_up_takes(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = config_of(file)
    jsonschema.validate(config, json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text()))
    prepared = prepare_config(copy.deepcopy(config))  # as ray up does, defaults filled in
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nodes_ask_for_a_token_that_is_in_no_file_of_ours(file: Path) -> None:
    config = config_of(file)
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    for which in STARTS:
        assert all(re.search(r"export RAY_AUTH_MODE=token;.*ray start", line) for line in config[which])
    assert not re.search(r"(AKIA|hf_|-----BEGIN)\w", file.read_text())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_start_commands_have_only_flags_that_ray_start_has(file: Path) -> None:
    config = config_of(file)
    (head,), (worker,) = (ray_starts(config, which) for which in STARTS)
    options = check_ray_start(head.replace("~/ray_bootstrap_config.yaml", str(file)))
    assert options["head"]
    assert options["dashboard_host"] == "127.0.0.1", "reached through ray dashboard or ssh, not by everyone"
    assert options["autoscaling_config"]
    joined = check_ray_start(worker.replace("$RAY_HEAD_IP", "192.0.2.1"))
    assert joined["address"] == f"192.0.2.1:{options['port']}"
    assert joined["metrics_export_port"] == options["metrics_export_port"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_workers_of_clouds_have_gpus_and_go_when_idle(file: Path) -> None:
    config = config_of(file)
    if config["provider"]["type"] == "local":
        return
    gpu = config["available_node_types"]["gpu"]
    assert gpu["min_workers"] == 0
    assert gpu["max_workers"] <= config["max_workers"]
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert "PROJECT" in str(config) or "FILE_SYSTEM" in str(config), "what a user must fill in is plain to see"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Nodes:
    """Ray nodes started by the commands of a cluster file, in a session folder and with ports of their own."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.folder = tempfile.mkdtemp(prefix="tide", dir="/tmp")  # sockets lie in it, their paths must be short
        self.config, self.port = config, free_port()
        token = Path(self.folder) / "auth_token"
        token.write_text("a" * 64)
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_TMPDIR")
        } | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, which: str, *more: str) -> None:
        """Run the file's own command line, but for ports that other tests may hold, and in the foreground."""
        (command,) = ray_starts(self.config, which)
        command = re.sub(r"--port=\d+", f"--port={self.port}", command)
        command = re.sub(r"--metrics-export-port=\d+", f"--metrics-export-port={free_port()}", command)
        command = re.sub(r" --autoscaling-config=\S+", "", command)  # it would ssh to the addresses of the example
        command = command.replace("$RAY_HEAD_IP:6379", f"127.0.0.1:{self.port}")
        arguments = [*command.split(), "--block", "--num-cpus=1", "--object-store-memory=100000000", *more]
        log = open(Path(self.folder) / f"{which}.log", "wb")  # noqa: SIM115
        self.processes.append(subprocess.Popen(arguments, env=self.environment, stdout=log, stderr=subprocess.STDOUT))

    def run(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**self.environment, **environment},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def close(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes(config_of(ROOT / "cluster" / "ray-up-local.yaml"))
    yield made
    made.close()


COUNT_NODES = """
import ray, sys, time
ray.init(address=sys.argv[1] if len(sys.argv) > 1 else "ADDRESS", log_to_driver=False, logging_level="ERROR")
deadline = time.time() + 60
while sum(node["Alive"] for node in ray.nodes()) < 2 and time.time() < deadline:
    time.sleep(0.5)
print("nodes", sum(node["Alive"] for node in ray.nodes()), "answer", ray.get(ray.remote(lambda: 42).remote()))
"""


@pytest.mark.slow
def test_the_commands_make_a_cluster_that_only_the_token_opens(nodes: Nodes) -> None:
    """The head and a worker by the file's own commands, on one machine; a driver with the token and one without."""
    nodes.start("head_start_ray_commands", f"--temp-dir={nodes.folder}/ray", f"--dashboard-port={free_port()}")
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", nodes.port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < deadline, (Path(nodes.folder) / "head_start_ray_commands.log").read_text()
            time.sleep(0.5)
    nodes.start("worker_start_ray_commands")
    code = COUNT_NODES.replace("ADDRESS", f"127.0.0.1:{nodes.port}")
    done = nodes.run(code)
    assert "nodes 2 answer 42" in done.stdout, done.stderr[-3000:]
    wrong = Path(nodes.folder) / "wrong"
    wrong.write_text("b" * 64)
    refused = nodes.run(code, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode != 0
    assert "answer" not in refused.stdout
