"""Manifests for KubeRay against the fields that there are, and against each other and this package."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from kuberay_fields import SCHEMAS
from ray_start import check_ray_start
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.serve.config import LLMServingArgs

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "cluster").glob("kuberay-*.yaml"))


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def cluster_of(kind: str) -> dict[str, Any]:
    (found,) = [one for file in FILES for one in documents(file) if one["kind"] == kind]
    return found["spec"]["rayClusterSpec" if kind == "RayJob" else "rayClusterConfig"]


def values(node: Any) -> Iterator[dict[str, Any]]:
    """All mappings in a document."""
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from values(child)
    elif isinstance(node, list):
        for child in node:
            yield from values(child)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_field_is_one_that_there_is(file: Path) -> None:
    for one in documents(file):
        jsonschema.Draft202012Validator(SCHEMAS[one["kind"]]).validate(one)


def test_a_misspelt_field_would_be_found() -> None:
    (job,) = documents(ROOT / "cluster" / "kuberay-rayjob.yaml")
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 4
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.Draft202012Validator(SCHEMAS["RayJob"]).validate(job)


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
def test_clusters_have_gpu_workers_autoscaling_a_token_and_a_head_that_survives(kind: str) -> None:
    cluster = cluster_of(kind)
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (low,) = re.findall(r"ray\[data,serve\]>=(\d+\.\d+)", " ".join(pins))
    assert cluster["rayVersion"].startswith(f"{low}.")
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["authOptions"] == {"mode": "token", "secretName": "tide-ray-token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    pod = workers["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "what autoscaler v2 asks for"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    storage = {one["metadata"]["name"]: one for one in documents(ROOT / "cluster" / "kuberay-storage.yaml")}
    service = re.fullmatch(r"redis://([\w-]+):6379", cluster["gcsFaultToleranceOptions"]["redisAddress"])
    assert service is not None
    assert service[1] in storage
    for template in (cluster["headGroupSpec"]["template"], workers["template"]):
        (volume,) = template["spec"]["volumes"]
        assert storage[volume["persistentVolumeClaim"]["claimName"]]["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
def test_metrics_are_exported_where_prometheus_is_told_to_look(kind: str) -> None:
    cluster = cluster_of(kind)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        port = group["rayStartParams"]["metrics-export-port"]
        assert group["template"]["metadata"]["annotations"] == {
            "prometheus.io/scrape": "true", "prometheus.io/port": port,
        }  # fmt: skip
        named = {p["name"]: str(p["containerPort"]) for p in group["template"]["spec"]["containers"][0]["ports"]}
        assert named["metrics"] == port
        check_ray_start(shlex.join(["ray", "start", *(f"--{k}={v}" for k, v in group["rayStartParams"].items())]))


def test_secrets_come_by_reference_and_the_readme_makes_each_of_them() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for file in FILES:
        for one in values(documents(file)):
            name = str(one.get("name", ""))
            if re.search("TOKEN|PASSWORD|KEY", name):
                assert "value" not in one, name
            if "redisPassword" in one:
                assert one["redisPassword"].keys() == {"valueFrom"}
            if "secretKeyRef" in one:
                reference = one["secretKeyRef"]
                assert f"kubectl create secret generic {reference['name']}" in readme
                assert f"--from-literal={reference['key']}=" in readme
    assert "kubectl create secret generic tide-ray-token --from-literal=auth_token=" in readme, "KubeRay's key"


def test_the_jobs_command_has_flags_that_there_are_and_needs_no_quoting() -> None:
    """It passes through two shells, and a quoted $? would be that of the first. Rejected rows, exit code 3, would make
    KubeRay build a new cluster to find a finished job, three times over."""
    (job,) = documents(ROOT / "cluster" / "kuberay-rayjob.yaml")
    entrypoint = job["spec"]["entrypoint"]
    assert re.fullmatch(r"[\w ./-]+", entrypoint)
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", entrypoint)}
    assert flags - {"config"} <= set(GenerateJobConfig.model_fields)
    assert "rejected_rows_ok" in flags


def test_the_service_is_one_that_serve_would_deploy() -> None:
    (service,) = documents(ROOT / "cluster" / "kuberay-rayservice.yaml")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "tide_ray.serve:build_openai_app"
    ports = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert {"containerPort": schema.http_options.port, "name": "serve"} in ports
    LLMServingArgs.build(application.args)
    gpus = application.args["llm_configs"][0]["deployment_config"]["ray_actor_options"]["num_gpus"]
    assert gpus == 1, "what a worker pod has"
