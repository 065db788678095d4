"""Where actors go, and what is refused before Ray would wait for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tide_ray.config import EngineConfig
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
        (LAPTOP, 1, (0, 7, 8)),
        (LAPTOP, 2, (0, 3, 4)),
        ([{"CPU": 1.0}], 1, (0, 0, 1)),
        ([{"CPU": 2.0}], 1, (0, 1, 2)),
        ([{"CPU": 2.0}], 2, (0, 0, 1)),
        ([{"CPU": 4.0}, {"CPU": 4.0}], 2, (0, 3, 4)),
        (GPU_NODE, 4, (1, 0, 4)),
        (GPU_NODE, 1, (1, 0, 16)),
    ],
)
def test_actors_leave_a_cpu_of_each_node_to_reads_and_writes(
    nodes: list[dict[str, float]], num_actors: int, expected: tuple[float, float, int]
) -> None:
    made = plan(nodes, num_actors)
    assert made == Placement(*expected[:2], num_actors)
    assert made.share_of(EngineConfig(), nodes[0]).num_threads == expected[2]


def test_a_cpu_engine_takes_no_gpu_unless_told() -> None:
    assert plan(GPU_NODE, device="cpu").num_gpus == 0
    assert plan(GPU_NODE, 2, device="cpu", num_gpus=1).num_gpus == 1
    assert plan(GPU_NODE, 8, device="cuda", num_gpus=0.5).actors_on(GPU_NODE[0]) == 8


@pytest.mark.parametrize(
    ("nodes", "num_actors", "max_actors", "given", "expected"),
    [
        (LAPTOP, 1, 2, {}, Placement(0, 3, 2)),
        (LAPTOP, 1, 64, {}, Placement(0, 0, 8)),  # Ray would start any number of those that take no CPU
        ([{"CPU": 2.0}], 1, 2, {}, Placement(0, 0, 2)),
        ([{"CPU": 2.0}], 3, 64, {}, Placement(0, 0, 3)),  # what was asked for at the start stays
        (LAPTOP, 1, 64, {"num_cpus": 2}, Placement(0, 2, 64)),  # on nodes to come, too
        (GPU_NODE, 2, 64, {}, Placement(1, 0, 64)),
    ],
)
def test_a_pool_that_grows_is_planned_for_the_most_it_may_be(
    nodes: list[dict[str, float]], num_actors: int, max_actors: int, given: dict[str, Any], expected: Placement
) -> None:
    assert plan(nodes, num_actors, max_actors=max_actors, **given) == expected


def test_each_actor_has_its_share_of_the_node_it_comes_to() -> None:
    engine = EngineConfig(kv_memory_fraction=0.6)
    of_gpus = plan([*GPU_NODE, {"CPU": 64.0, "GPU": 1.0}], 2, max_actors=9)
    assert [of_gpus.actors_on(node) for node in ({"GPU": 4.0}, {"GPU": 1.0}, {"GPU": 16.0}, {})] == [4, 1, 9, 1]
    shares = [of_gpus.share_of(engine, {"CPU": cpus, "GPU": gpus}) for cpus, gpus in ((16.0, 4.0), (64.0, 1.0))]
    assert [share.num_threads for share in shares] == [4, 64], "unlike nodes, unlike shares"
    assert [share.kv_memory_fraction for share in shares] == [0.6, 0.6]

    part = plan(GPU_NODE, 1, max_actors=8, num_gpus=0.25, num_cpus=4).share_of(engine, GPU_NODE[0])
    assert (part.num_threads, part.kv_memory_fraction) == (4, 0.15), "the CPUs bound them, the GPU is shared by four"
    on_cpus = plan(LAPTOP, 1, max_actors=3).share_of(replace(engine, num_threads=5), LAPTOP[0])
    assert (on_cpus.num_threads, on_cpus.kv_memory_fraction) == (5, pytest.approx(0.2))


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
    assert made == Placement(1, 0, 2)
    assert asked == [[{"GPU": 1.0}] * 2, []], "and let go of again"


def test_a_cluster_that_does_not_grow_is_refused_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "ASK_SECONDS", 0.0)
    asked: list[Any] = []
    with pytest.raises(UserError, match="asked for 2 x 1 GPUs, the cluster has 0"):
        wait_for_placement(lambda: plan(LAPTOP, 2, num_gpus=1), asked.append, [{"GPU": 1.0}] * 2, 0.05)
    assert asked[-1] == []


def test_a_cluster_with_room_is_not_asked() -> None:
    assert wait_for_placement(lambda: plan(LAPTOP), pytest.fail, [{"CPU": 1.0}], 60) == plan(LAPTOP)
