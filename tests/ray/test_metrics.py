"""Metrics as Prometheus would see them, from the port of a real Ray node; and structured logs of a real job."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from tide_ray.config import EngineConfig
from tide_ray.data.actor import Generator, GeneratorOptions
from tide_ray.data.metrics import METRICS

pytestmark = pytest.mark.slow
SAMPLE = re.compile(r"^(ray_tide\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
PROMPT = "a prompt that is nobody's business"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The metrics port of a local Ray, which reports twice a second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=100 * 2**20,
            _metrics_export_port=number,
            _system_config={"metrics_report_interval_ms": 500},
        )
        yield number
        ray.shutdown()


def scraped(port: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Our samples by name, each with its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for name, labels, value in SAMPLE.findall(text):
        found.setdefault(name, []).append((dict(LABEL.findall(labels)), float(value)))
    return found


def eventually(port: int, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while True:
        found = scraped(port)
        if holds(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


@ray.remote
class Holder:
    """Keeps the class that Ray Data would run, and its engine's own counters at hand."""

    def __init__(self, model: str) -> None:
        config = EngineConfig(dtype="float32", device="cpu", max_num_seqs=4, max_model_len=64, num_threads=1)
        self.generator = Generator(model, config, GeneratorOptions(job="a-job", continues_on_error=True))

    async def run(self, rows: list[dict[str, Any]]) -> int:
        tables = [table async for table in self.generator(pa.Table.from_pylist(rows))]
        return sum(sum(row["num_generated_tokens"] for row in table.to_pylist()) for table in tables)

    def facts(self) -> dict[str, Any]:
        engine = self.generator.engine
        stats = engine.stats
        return {"steps": stats.num_steps, "layers": engine.num_layers, "prompt": stats.num_prompt_tokens}


def test_a_node_exports_what_the_engine_counted(port: int, tiny_llama_folder: Path) -> None:
    holder = Holder.remote(str(tiny_llama_folder))
    params = json.dumps({"max_tokens": 5, "ignore_eos": True})
    rows = [{"prompt": f"{PROMPT} {n}", "sampling_params": params} for n in range(6)]
    rows.append({"prompt": "far too long " * 20, "sampling_params": params})
    num_tokens = ray.get(holder.run.remote(rows))
    facts = ray.get(holder.facts.remote())
    assert num_tokens == 30

    found = eventually(port, lambda f: sum(v for _, v in f.get("ray_tide_tokens_total", [])) >= num_tokens)

    def only(name: str) -> float:
        ((labels, value),) = found[name]
        assert labels["job"] == "a-job"
        return value

    assert only("ray_tide_tokens_total") == num_tokens
    assert only("ray_tide_requests_total") == 6
    assert only("ray_tide_rejected_requests_total") == 1
    assert only("ray_tide_prompt_tokens_total") == facts["prompt"]
    assert only("ray_tide_steps_total") == facts["steps"]
    assert only("ray_tide_layer_runs_total") == only("ray_tide_full_layer_runs_total") > 0
    assert [(labels["depth"], value) for labels, value in found["ray_tide_tokens_by_depth_total"]] == [
        (str(facts["layers"]), num_tokens)
    ]
    assert [(labels["stage"], value) for labels, value in found["ray_tide_launches_total"]] == [
        ("full", facts["steps"])
    ]
    assert [(labels["stage"], value) for labels, value in found["ray_tide_queue_depth"]] == [("admission", 0)]
    assert only("ray_tide_occupancy") == only("ray_tide_residents") == only("ray_tide_kv_use") == 0
    assert found.keys() <= {metric.exported_name for metric in METRICS}

    # A second batch adds to the counters, it does not start them again.
    assert ray.get(holder.run.remote(rows[:2])) == 10
    again = eventually(port, lambda f: f["ray_tide_tokens_total"][0][1] >= 40)
    assert again["ray_tide_tokens_total"][0][1] == 40
    assert again["ray_tide_tokens_total"][0][0]["WorkerId"]


def test_a_jobs_log_is_a_record_a_line_without_prompts(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Driver and actors write the same format, and one id tells both that they are of one job."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"prompt": f"{PROMPT} {n}"}) + "\n" for n in range(3)))
    session = tempfile.mkdtemp(prefix="tide", dir="/tmp")  # sockets lie in it, and their paths must be short
    environment = {**os.environ, "RAY_TMPDIR": session, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        environment.pop(name, None)
    command = [
        sys.executable, "-m", "tide_ray.cli", "generate", "--model", tiny_llama_folder, "--prompts", prompts,
        "--output", out, "--max-tokens", "4", "--device", "cpu", "--dtype", "float32", "--compile", "off",
        "--num-threads", "1", "--log-format", "json",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        records = [json.loads(line) for line in done.stderr.splitlines() if line.strip()]
        ours = [record for record in records if record.get("name", "").startswith("tide_ray")]
        job = json.loads((out / "run.json").read_text())["job"]
        assert {record["job"] for record in ours} == {job}
        by_message = {record["message"]: record for record in ours}
        assert by_message.keys() >= {"job started", "starting engines", "progress", "job finished"}
        assert by_message["job started"]["job_id"], "Ray's own"
        assert by_message["progress"]["total_rows"] == 3
        assert by_message["job finished"]["rows"] == 3
        assert by_message["job finished"]["levelname"] == "INFO"
        files = list(Path(session).glob("**/logs/worker-*"))
        lines = [line for file in files for line in file.read_text().splitlines() if '"name": "tide_ray' in line]
        actor = {record["message"]: record for record in map(json.loads, lines)}
        assert actor.keys() >= {"engine started", "batch done"}
        assert {record["job"] for record in actor.values()} == {job}
        assert actor["batch done"]["actor_id"]
        assert not any(PROMPT in text for text in (done.stderr, *(file.read_text() for file in files)))
    finally:
        shutil.rmtree(session, ignore_errors=True)
