"""Pools that grow and actors that ask for nodes, on two unlike nodes."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.data import DataContext
from rich.console import Console

from tide_ray.analytics.tables import most_residents
from tide_ray.data.actor import Generator
from tide_ray.data.job import run_generate
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.data.reports import Reports
from tide_ray.types import UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """Ray's ids of two nodes: ``plain`` has 2 CPUs, ``wanted`` has 3, two fake A100s and the label ``zone: a``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        wanted = made.add_node(num_cpus=3, num_gpus=2, resources={"accelerator_type:A100": 1}, labels={"zone": "a"})
        ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
        patch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 90)
        # On a busy machine the first actor could have answered every row before the second one is up.
        patch.setattr(DataContext.get_current(), "wait_for_min_actors_s", 120)
        yield {"plain": made.head_node.node_id, "wanted": wanted.node_id}
        ray.shutdown()
        made.shutdown()


def check_rows(job: Any) -> list[dict[str, Any]]:
    """Every row of the job was answered once. Returns what ran."""
    ids = job.ids("data")
    assert sorted(ids) == sorted(job.ids("_input"))
    facts = job.facts()
    assert sum(actor["rows"] for actor in facts["actors"]) == len(ids)
    return facts["actors"]


def test_a_pool_grows_while_rows_wait_and_stays_on_the_labelled_node(job: Any, nodes: dict[str, str]) -> None:
    class Patient(Generator):
        """Its rows wait until there are two engines, so that only a pool that grows gets on."""

        async def __call__(self, batch: Any) -> Any:
            assert self._reporter is not None
            for _ in range(600):
                if Reports(str(self._reporter.folder)).num_actors() == 2:
                    break
                await asyncio.sleep(0.1)
            async for table in super().__call__(batch):
                yield table

    settings = {
        "model": str(job.model), "prompts": [str(job.prompts)], "output": str(job.out), "batch_size": 4,
        "num_actors": 1, "max_actors": 2, "labels": {"zone": "in(a, c)"}, "ignore_eos": True, **job.LIMITS,
    }  # fmt: skip
    code = run_generate(GenerateJobConfig.build(settings), Console(file=io.StringIO()), generator=Patient)
    assert code == 0
    actors = check_rows(job)
    facts = job.facts()
    assert (facts["num_actors"], facts["max_actors"], facts["num_actors_run"]) == (1, 2, 2)
    assert [actor["node"] for actor in actors] == [nodes["wanted"]] * 2
    assert all(actor["rows"] for actor in actors), "rows were left for the one that came later"
    assert [actor["num_threads"] for actor in actors] == [1, 1], "three CPUs shared by the most there may be"


def test_two_actors_share_a_gpu_of_the_type_asked_for(job: Any, nodes: dict[str, str]) -> None:
    assert job.run(num_actors=2, num_gpus_per_actor=0.5, accelerator_type="A100")[0] == 0
    assert [actor["node"] for actor in check_rows(job)] == [nodes["wanted"]] * 2


def test_actors_on_unlike_nodes_each_have_the_threads_of_theirs(job: Any, nodes: dict[str, str]) -> None:
    assert job.run(num_actors=2, num_cpus_per_actor=2, num_threads=None, batch_size=1)[0] == 0
    actors = check_rows(job)
    threads = {actor["node"]: actor["num_threads"] for actor in actors}
    assert threads == {nodes["plain"]: 2, nodes["wanted"]: 3}
    assert most_residents({"facts": job.facts()}) == 2 * job.LIMITS["max_num_seqs"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": {"zone": "b"}}, r"labels: no node has them, got \{'zone': 'b'\}"),
        ({"accelerator_type": "H100"}, "accelerator_type: no node has one, got 'H100'; there are: A100"),
        (
            {"labels": {"zone": "!a"}, "num_gpus_per_actor": 1},
            "num_gpus_per_actor: asked for 1 x 1 GPUs, the nodes asked for have 0",
        ),
        (
            {"labels": {"zone": "a"}, "num_actors": 2, "num_cpus_per_actor": 2, "dry_run": True},
            "num_cpus_per_actor: asked for 2 x 2 CPUs, the nodes asked for have 3",
        ),
    ],
)
def test_what_the_nodes_asked_for_do_not_have_is_refused_at_once(
    job: Any, nodes: dict[str, str], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        job.run(**settings)


def test_a_dry_run_tells_both_ends_of_a_pool_that_grows(job: Any, nodes: dict[str, str]) -> None:
    code, printed = job.run(dry_run=True, num_actors=1, max_actors=2, hourly_cost=3600.0, labels={"zone": "a"})
    assert code == 0
    assert "1 to 2 on cpu" in printed
    assert "once all 2 actors are there" in printed
