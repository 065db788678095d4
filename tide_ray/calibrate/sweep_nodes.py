"""Where a sweep's tasks may run, and how much of a cluster they leave to others."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tide_ray.calibrate.sweep_config import Resources
from tide_ray.data.nodes import matches
from tide_ray.data.placement import gpus_for
from tide_ray.types import UserError


def joins_a_cluster(address: str | None) -> bool:
    """Whether Ray runs already, for others as well."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") != "local" or (
        "ray" in sys.modules and sys.modules["ray"].is_initialized()
    )


def fitting_gpus(number: int, resources: Resources, device: str, nodes: Sequence[Mapping[str, Any]]) -> float:
    """GPUs of a task. Ray would wait for ever for a node that can never run it.

    Raises:
        UserError: no node has the resources and the labels.
    """
    gpus = resources.num_gpus
    if gpus is None:
        gpus = gpus_for(device, sum(node["Resources"].get("GPU", 0) for node in nodes))
    wanted = {"CPU": resources.num_cpus, "GPU": gpus, "memory": (resources.memory or 0) * 2**30}
    labelled = [node for node in nodes if matches(node.get("Labels", {}), resources.labels)]
    if not labelled:
        raise UserError(f"models[{number}]: labels: no node has them, got {resources.labels!r}")
    if not any(all(node["Resources"].get(name, 0) >= amount for name, amount in wanted.items()) for node in labelled):
        field = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        asked = ", ".join(
            f"{field[name]} {amount / 2**30 if name == 'memory' else amount:g}"
            for name, amount in wanted.items()
            if amount
        )
        raise UserError(f"models[{number}]: no node has room for one of its tasks, got {asked}")
    return gpus


def has_room(
    num_cpus: float,
    running: Sequence[float],
    *,
    max_parallel: int | None,
    max_cpus: float | None,
    num_nodes: int,
    total_cpus: float,
    free_cpus: float,
) -> bool:
    """Whether one more task may start.

    Without ``max_cpus`` the nodes of a cluster keep a free CPU each: a generation job that runs there, or starts while
    tasks run, reads and writes with it. A sweep that runs alone starts one task whatever it needs.

    Args:
        num_cpus: of the task.
        running: CPUs of the tasks that run.
        num_nodes: of a cluster that others use as well; 0: Ray is this sweep's own.
        total_cpus, free_cpus: of the cluster.
    """
    if max_parallel is not None and len(running) >= max_parallel:
        return False
    if max_cpus is not None:
        return not running or sum(running) + num_cpus <= max_cpus
    return not num_nodes or free_cpus - num_cpus >= min(num_nodes, total_cpus - num_cpus)
