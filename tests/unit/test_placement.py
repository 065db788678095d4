"""Where actors go, and what is refused before Ray would wait for it."""

from __future__ import annotations

from typing import Any

import pytest

from tide_ray.data import placement
from tide_ray.data.placement import Placement, plan_placement, wait_for_placement
from tide_ray.types import UserError

LAPTOP = [{"CPU": 8.0}]
GPU_NODE = [{"CPU": 16.0, "GPU": 4.0}]


def plan(nodes: list[dict[str, float]], num_actors: int = 1, device: str = "auto", **given: Any) -> Placement:
    return plan_placement(nodes, num_actors=num_actors, device=device, **given)


@pytest.mark.parametrize(
    ("nodes", "num_actors", "expected"),
    [
        (LAPTOP, 1, Placement(0, 7, 8, 1)),
        (LAPTOP, 2, Placement(0, 3, 4, 2)),
        ([{"CPU": 1.0}], 1, Placement(0, 0, 1, 1)),
        ([{"CPU": 2.0}], 1, Placement(0, 1, 2, 1)),
        ([{"CPU": 2.0}], 2, Placement(0, 0, 1, 2)),
        ([{"CPU": 4.0}, {"CPU": 4.0}], 2, Placement(0, 3, 4, 1)),
        (GPU_NODE, 4, Placement(1, 0, 4, 4)),
        (GPU_NODE, 1, Placement(1, 0, 16, 1)),
    ],
)
def test_actors_leave_a_cpu_of_each_node_to_reads_and_writes(
    nodes: list[dict[str, float]], num_actors: int, expected: Placement
) -> None:
    assert plan(nodes, num_actors) == expected


def test_a_cpu_engine_takes_no_gpu_unless_told() -> None:
    assert plan(GPU_NODE, device="cpu").num_gpus == 0
    assert plan(GPU_NODE, 2, device="cpu", num_gpus=1).num_gpus == 1
    assert plan(GPU_NODE, 8, device="cuda", num_gpus=0.5).actors_per_node == 8


@pytest.mark.parametrize(
    ("nodes", "num_actors", "given", "message"),
    [
        (LAPTOP, 2, {"num_gpus": 1}, "num_gpus_per_actor: asked for 2 x 1 GPUs, the cluster has 0"),
        (LAPTOP, 1, {"device": "cuda"}, "num_gpus_per_actor: asked for 1 x 1 GPUs, the cluster has 0"),
        (GPU_NODE, 5, {}, "num_gpus_per_actor: asked for 5 x 1 GPUs, the cluster has 4"),
        (LAPTOP, 3, {"num_cpus": 4}, "num_cpus_per_actor: asked for 3 x 4 CPUs, the cluster has 8"),
        (
            [{"GPU": 1.0, "CPU": 1.0}] * 2,
            1,
            {"num_gpus": 2},
            "num_gpus_per_actor: asked for 1 x 2 GPUs, no way to place them, its nodes have 1, 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    nodes: list[dict[str, float]], num_actors: int, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        plan(nodes, num_actors, **given)
    assert str(error.value) == message


def test_a_cluster_that_grows_is_waited_for_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "ASK_SECONDS", 0.0)
    nodes, asked = [{"CPU": 4.0}], []

    def grow(bundles: Any) -> None:
        asked.append(list(bundles))
        nodes.extend(GPU_NODE if bundles else [])

    made = wait_for_placement(lambda: plan(nodes, 2, num_gpus=1), grow, [{"GPU": 1.0}] * 2, 60)
    assert made == Placement(1, 0, 2, 2)
    assert asked == [[{"GPU": 1.0}] * 2, []], "and let go of again"


def test_a_cluster_that_does_not_grow_is_refused_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "ASK_SECONDS", 0.0)
    asked: list[Any] = []
    with pytest.raises(UserError, match="asked for 2 x 1 GPUs, the cluster has 0"):
        wait_for_placement(lambda: plan(LAPTOP, 2, num_gpus=1), asked.append, [{"GPU": 1.0}] * 2, 0.05)
    assert asked[-1] == []


def test_a_cluster_with_room_is_not_asked() -> None:
    assert wait_for_placement(lambda: plan(LAPTOP), pytest.fail, [{"CPU": 1.0}], 60) == plan(LAPTOP)
