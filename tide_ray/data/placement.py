"""Where actors go: the GPUs, CPUs and threads of each, planned from the cluster, and refused at once if it cannot be.

Ray itself waits half an hour for resources that never come, and counts CPUs that map actors hold against the reads and
writes beside them; both are settled here before anything starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tide_ray.types import UserError

ASK_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Placement:
    """Ray resources of one actor, CPU threads for its engine, and how many actors share a node."""

    num_gpus: float
    num_cpus: float
    num_threads: int
    actors_per_node: int


def plan_placement(
    nodes: Sequence[Mapping[str, float]],
    *,
    num_actors: int,
    device: str,
    num_gpus: float | None = None,
    num_cpus: float | None = None,
) -> Placement:
    """Plan ``num_actors`` equal actors.

    Args:
        nodes: the resources of each live node ("CPU", "GPU").
        num_actors: how many actors must run at once.
        device: the engine's device; ``auto`` takes a GPU per actor if the cluster has any.
        num_gpus, num_cpus: given per actor, or None to plan them.

    Raises:
        UserError: the actors do not fit, naming what was asked for and what there is.
    """
    total_gpus = sum(node.get("GPU", 0) for node in nodes)
    if num_gpus is None:
        num_gpus = gpus_for(device, total_gpus)
    _check_fits("num_gpus_per_actor", "GPUs", [node.get("GPU", 0) for node in nodes], num_gpus, num_actors)
    if num_cpus is not None:
        _check_fits("num_cpus_per_actor", "CPUs", [node.get("CPU", 0) for node in nodes], num_cpus, num_actors)
    elif num_gpus:
        num_cpus = 0.0
    else:
        num_cpus = _spare_cpus([node.get("CPU", 0) for node in nodes], num_actors)
    per_node = _actors_per_node(nodes, num_gpus, num_cpus, num_actors)
    cores = min((int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1), default=1)
    return Placement(num_gpus, num_cpus, max(1, cores // per_node), per_node)


def wait_for_placement(
    plan: Callable[[], Placement],
    ask_for: Callable[[Sequence[Mapping[str, float]]], None],
    bundles: Sequence[Mapping[str, float]],
    seconds: float,
) -> Placement:
    """What ``plan`` returns once the cluster has grown enough; refused as it refuses it after so many seconds.

    Args:
        ask_for: has the autoscaler make room for bundles of resources, and goes on asking until it is called again.
        bundles: one for each actor.

    Raises:
        UserError: as ``plan`` raised it last.
    """
    deadline = time.monotonic() + seconds
    has_asked = False
    try:
        while True:
            try:
                return plan()
            except UserError:
                if time.monotonic() >= deadline:
                    raise
            if not has_asked:
                ask_for(bundles)
                has_asked = True
            time.sleep(ASK_SECONDS)
    finally:
        if has_asked:
            ask_for([])  # or the nodes would be kept when the job is over


def gpus_for(device: str, total_gpus: float) -> float:
    """GPUs of an engine for which no number is given: ``auto`` takes one if the cluster has any."""
    return 1.0 if device.startswith("cuda") or (device == "auto" and total_gpus > 0) else 0.0


def live_nodes(nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, float]]:
    """The resources of the live nodes in what ``ray.nodes()`` returns."""
    return [node["Resources"] for node in nodes if node["Alive"]]


def _check_fits(name: str, what: str, available: Sequence[float], each: float, num_actors: int) -> None:
    if each == 0 or sum(int(amount / each + 1e-9) for amount in available) >= num_actors:
        return
    if sum(available) < each * num_actors:
        detail = f"the cluster has {sum(available):g}"
    else:
        detail = f"no way to place them, its nodes have {', '.join(f'{amount:g}' for amount in available)}"
    raise UserError(f"{name}: asked for {num_actors} x {each:g} {what}, {detail}")


def _spare_cpus(cpus: Sequence[float], num_actors: int) -> float:
    """The most whole CPUs per actor that leave one on each node to reads and writes; 0 if there are too few.

    An actor's engine uses its threads whatever Ray counts; the count spreads actors over nodes.
    """
    for each in range(max(1, int(max(cpus, default=0))), 0, -1):
        if sum(int(max(amount - 1, 0)) // each for amount in cpus) >= num_actors:
            return float(each)
    return 0.0


def _actors_per_node(nodes: Sequence[Mapping[str, float]], gpus: float, cpus: float, num_actors: int) -> int:
    each, what = (gpus, "GPU") if gpus else (cpus, "CPU")
    if not each:
        return num_actors
    most = max(int(node.get(what, 0) / each + 1e-9) for node in nodes)
    return max(1, min(num_actors, most))
