"""Sweeps over models on two nodes: side by side with a generation job, with a model that fails, killed and resumed."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.cluster_utils import Cluster
from safetensors.torch import load_file, save_file

from tide_ray.calibrate.calibrate import calibrate
from tide_ray.calibrate.sweep import run_sweep
from tide_ray.calibrate.sweep_config import SweepConfig
from tide_ray.calibrate.sweep_task import Outcome, Task, run_task
from tide_ray.exits.checkpoint import Routers
from tiny_models import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
QUICK = {"dtype": "float32", "device": "cpu", "max_tokens": 12, "bottleneck": 16, "shortlist": 64, "num_threads": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes; the second is labelled for calibration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        made.add_node(num_cpus=2, labels={"ray-subcluster": "calibrate"})
        ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per architecture, and ``broken``: complete by its files' names, with a weight of another shape."""
    folder = tmp_path_factory.mktemp("models")
    for arch in ("llama", "qwen2", "gpt2"):
        save_tiny_model(arch, folder / arch, with_tokenizer=True)
    broken = save_tiny_model("llama", folder / "broken", seed=1, with_tokenizer=True)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.2.mlp.up_proj.weight"][:, :-8].contiguous()
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"number {i} of many, and {i * i}"}) + "\n" for i in range(64)))
    return file


def written(folder: Path) -> dict[str, int]:
    """When each file under ``folder`` was written."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def rows(output: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((output / "sweep.json").read_text())["models"]}


def statistics(output: Path, name: str) -> dict[str, Any]:
    """All sums of a model, added up over its files."""
    total: dict[str, Any] = {}
    for file in sorted((output / "_work" / name).glob("sums-*.safetensors")):
        for key, tensor in load_file(file).items():
            if ".rows." not in key:
                total[key] = total.get(key, 0) + tensor
    return total


def test_models_are_calibrated_beside_a_generation_job_and_a_broken_one_fails_alone(
    cluster: Cluster, models: Path, prompts: Path, demo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = subprocess.Popen(
        [
            sys.executable, ROOT / "jobs" / "generate.py", "--model", models / "llama", "--prompts", prompts,
            "--output", tmp_path / "generated", "--address", cluster.address, "--num-cpus-per-actor", "1",
            "--max-tokens", "8", "--device", "cpu", "--dtype", "float32", "--num-threads", "1",
        ],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    output = tmp_path / "sweep"
    labelled = {"labels": {"ray-subcluster": "calibrate"}}
    config = SweepConfig.build(
        {
            **QUICK,
            "output": str(output),
            "prompts": [str(prompts)],
            "boundaries": [2],
            "models": [
                {"model": str(models / "broken")},
                {"name": "one worker", "model": str(models / "llama")},
                {"name": "two workers", "model": str(models / "llama"), "workers": 2, **labelled},
                {"model": str(models / "gpt2"), **labelled},
                {"model": str(models / "absent")},
                {"model": "demo", "boundaries": [24], "num_prompts": 16, "max_tokens": 6, "refine": False},
            ],
        }
    )
    assert run_sweep(config) == 1
    _, errors = generation.communicate(timeout=120)
    assert generation.returncode == 0, errors[-3000:]

    found = rows(output)
    assert {name: row["status"] for name, row in found.items()} == {
        "broken": "failed", "one-worker": "ok", "two-workers": "ok", "gpt2": "ok", "absent": "failed", "demo": "ok",
    }  # fmt: skip
    assert found["broken"]["phase"] == "load"
    assert "cannot read the weights" in found["broken"]["error"]
    assert "no such folder" in found["absent"]["error"]
    assert not (output / "broken").exists()
    printed = capsys.readouterr().err
    assert "calibrated models" in printed
    assert "broken: failed in the phase load" in printed
    second = next(node["NodeID"] for node in ray.nodes() if node["Labels"].get("ray-subcluster") == "calibrate")
    for name in ("two-workers", "gpt2"):
        assert {node for nodes in found[name]["nodes"].values() for node in nodes} == {second}
    for name, depths in (("one-worker", (2,)), ("gpt2", (2,)), ("demo", (24,))):
        assert Routers.load(output / name).depths == depths
        assert found[name]["boundaries"] == list(depths)

    page = (output / "report.html").read_text()
    for name in ("one-worker", "gpt2", "demo"):
        assert f'href="{name}/report.html"' in page
        assert found[name]["verdict"] in (output / name / "report.html").read_text()
    assert "cannot read the weights" in page

    # However many workers shared it, a model has the same statistics and the same checkpoint, to rounding.
    assert len(list((output / "_work" / "two-workers").glob("sums-*"))) == 2
    one, two = (statistics(output, name) for name in ("one-worker", "two-workers"))
    assert one.keys() == two.keys()
    assert any("kv.2" in key for key in one)
    for key, tensor in one.items():
        assert ((two[key] - tensor).abs().max() <= 1e-12 * tensor.abs().max()).item(), key
    first, other = (Routers.load(output / name).boundaries[0] for name in ("one-worker", "two-workers"))
    assert first.thresholds == pytest.approx(other.thresholds, abs=1e-3)
    settings = next(model for model in config.models if model.name == "one-worker").calibration
    alone = calibrate(settings.model_copy(update={"output": str(tmp_path / "alone")})).boundaries[0]
    assert first.thresholds == pytest.approx(alone.thresholds, abs=1e-3)

    before = written(output)
    assert run_sweep(config) == 1, "the broken one is tried again, the others are finished"
    after = written(output)
    assert {name for name in before if after.get(name) != before[name]} <= {"sweep.json", "report.html", "_lock.guard"}
    assert {row["status"] for row in rows(output).values()} == {"kept", "failed"}


def test_a_sweep_whose_driver_was_killed_goes_on_and_repeats_no_finished_phase(
    cluster: Cluster, models: Path, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sweep"
    settings = {
        **QUICK,
        "output": str(output),
        "prompts": [str(prompts)],
        "max_parallel": 1,
        "models": [str(models / "qwen2"), {"model": str(models / "llama"), "workers": 2, "refine": False}],
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(ROOT / "jobs" / "calibrate.py"), "--config", str(file), "--address", cluster.address]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    answered = output / "_work" / "llama" / "answers-03.parquet"
    deadline = time.monotonic() + 200
    while not answered.exists():
        assert driver.poll() is None, driver.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = written(output / "_work")
    assert "qwen2/done.json" in before
    assert not (output / "llama").exists()

    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    assert {name: row["status"] for name, row in rows(output).items()} == {"qwen2": "kept", "llama": "ok"}
    assert "qwen2: is finished, nothing to do" in done.stderr
    after = written(output / "_work")
    phases = [name for name in before if name.endswith((".parquet", ".safetensors", "done.json"))]
    assert len(phases) >= 9, "four shards of answers of each model, and all of qwen2's"
    assert {name: after[name] for name in phases} == {name: before[name] for name in phases}
    assert Routers.load(output / "llama").depths


def test_a_worker_that_dies_is_started_again_and_one_that_always_dies_is_a_failure_of_its_model(
    cluster: Cluster, models: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_died = tmp_path / "has died"

    def run_or_die(task: Task) -> Outcome:
        if task.model.name == "always":
            os._exit(1)
        if task.phases == ("fit",) and not has_died.exists():
            has_died.touch()
            os._exit(1)
        return run_task(task)

    monkeypatch.setattr("tide_ray.calibrate.sweep.run_task", run_or_die)
    entries = [{"model": str(models / "llama"), "name": "always"}, {"model": str(models / "gpt2"), "workers": 2}]
    settings = {**QUICK, "prompts": [str(prompts)], "boundaries": [2], "refine": False}
    assert run_sweep(SweepConfig.build({**settings, "output": str(tmp_path / "sweep"), "models": entries})) == 1
    found = rows(tmp_path / "sweep")
    assert has_died.exists()
    assert found["gpt2"]["status"] == "ok"
    assert (found["always"]["status"], found["always"]["phase"]) == ("failed", "answers")
    assert "WorkerCrashedError" in found["always"]["error"]
