"""Where actors go: the GPUs, CPUs and threads of each, planned from the cluster, and refused at once if it cannot be.

Ray itself waits half an hour for resources that never come, and counts CPUs that map actors hold against the reads and
writes beside them; both are settled here before anything starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tide_ray.config import EngineConfig
from tide_ray.types import UserError

ASK_SECONDS = 2.0
ROUNDING = 1e-9
"""So that ten tenths of a GPU are one."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Ray resources of one actor, and the most actors that there may be at once."""

    num_gpus: float
    num_cpus: float
    max_actors: int

    def actors_on(self, node: Mapping[str, float]) -> int:
        """The most actors that can share a node with these resources."""
        each = {"GPU": self.num_gpus, "CPU": self.num_cpus}
        room = [int(node.get(what, 0) / amount + ROUNDING) for what, amount in each.items() if amount]
        return max(1, min([self.max_actors, *room]))

    def share_of(self, engine: EngineConfig, node: Mapping[str, float]) -> EngineConfig:
        """``engine`` with its share of a node: CPU threads, and memory for K/V.

        Ray would give it as many threads as CPUs it set aside, for a GPU actor one. An engine measures what memory is
        free as it starts, when others on its node, or on its part of a GPU, may not have taken theirs.
        """
        num_actors = self.actors_on(node)
        threads = max(1, int(node.get("CPU", 0)) // num_actors)
        part = min(self.num_gpus, 1.0) if self.num_gpus else 1 / num_actors
        return replace(
            engine,
            num_threads=engine.num_threads or threads,
            kv_memory_fraction=engine.kv_memory_fraction * part,
        )


def plan_placement(
    nodes: Sequence[Mapping[str, float]],
    *,
    num_actors: int,
    max_actors: int | None = None,
    device: str,
    num_gpus: float | None = None,
    num_cpus: float | None = None,
    where: str = "the cluster has",
) -> Placement:
    """Plan equal actors.

    Where CPUs are planned, what the nodes have now bounds the actors as well: at most one for each CPU, as Ray does not
    count what an actor without CPUs takes.

    Args:
        nodes: the resources of each live node ("CPU", "GPU") that actors may run on.
        num_actors: how many actors must run at once.
        max_actors: how many may; None: no more.
        device: the engine's device; ``auto`` takes a GPU per actor if the nodes have any.
        num_gpus, num_cpus: given per actor, or None to plan them.
        where: what the nodes are, for messages: the part before a number.

    Raises:
        UserError: ``num_actors`` do not fit, naming what was asked for and what there is.
    """
    gpus, cpus = ([node.get(what, 0) for node in nodes] for what in ("GPU", "CPU"))
    most = max_actors or num_actors
    if num_gpus is None:
        num_gpus = gpus_for(device, sum(gpus))
    _check_fits("num_gpus_per_actor", "GPUs", gpus, num_gpus, num_actors, where)
    if num_cpus is not None:
        _check_fits("num_cpus_per_actor", "CPUs", cpus, num_cpus, num_actors, where)
    elif num_gpus:
        num_cpus = 0.0
    else:
        most = max(num_actors, min(most, int(sum(cpus))))
        num_cpus = _spare_cpus(cpus, most)
    return Placement(num_gpus, num_cpus, most)


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


def _check_fits(name: str, what: str, available: Sequence[float], each: float, num_actors: int, where: str) -> None:
    if each == 0 or sum(int(amount / each + ROUNDING) for amount in available) >= num_actors:
        return
    if sum(available) < each * num_actors:
        detail = f"{where} {sum(available):g}"
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
