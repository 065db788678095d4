"""Cluster files for ``ray up`` against Ray's own schema, and their commands as far as one machine goes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from ports import free_port
from ray_start import RayNodes, check_ray_start

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


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[RayNodes]:
    token = tmp_path / "auth_token"
    token.write_text("a" * 64)
    made = RayNodes(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    yield made
    made.close()


def on_this_machine(command: str, port: int) -> str:
    """A file's command, but for ports that others may hold."""
    command = re.sub(r"--port=\d+", f"--port={port}", command)
    command = re.sub(r"--metrics-export-port=\d+", f"--metrics-export-port={free_port()}", command)
    command = re.sub(r" --autoscaling-config=\S+", "", command)  # it would ssh to the addresses of the example
    return command.replace("$RAY_HEAD_IP:6379", f"127.0.0.1:{port}") + " --num-cpus=1"


COUNT_NODES = """
import ray, sys, time
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
deadline = time.time() + 60
while sum(node["Alive"] for node in ray.nodes()) < 2 and time.time() < deadline:
    time.sleep(0.5)
print("nodes", sum(node["Alive"] for node in ray.nodes()), "answer", ray.get(ray.remote(lambda: 42).remote()))
"""


@pytest.mark.slow
def test_the_commands_make_a_cluster_that_only_the_token_opens(nodes: RayNodes, tmp_path: Path) -> None:
    """The head and a worker by the file's own commands, on one machine; a driver with the token and one without."""
    config = config_of(ROOT / "cluster" / "ray-up-local.yaml")
    for which in STARTS:
        (command,) = ray_starts(config, which)
        nodes.start(on_this_machine(command, nodes.port))
    done = nodes.run(["-c", COUNT_NODES, nodes.address])
    assert "nodes 2 answer 42" in done.stdout, done.stderr[-3000:]
    wrong = tmp_path / "wrong"
    wrong.write_text("b" * 64)
    refused = nodes.run(["-c", COUNT_NODES, nodes.address], RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode != 0
    assert "answer" not in refused.stdout
