"""What a second run of a job does, and what is still refused once Ray is up."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tide_ray.types import UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_cluster")]


def test_a_job_goes_on_from_what_is_committed_and_then_has_nothing_to_do(job: Any) -> None:
    """Taking the mark and some parts away leaves what a killed job leaves."""
    assert job.run(rows_per_part=4)[0] == 0
    complete = sorted(job.ids("data"))
    (job.out / "_SUCCESS").unlink()
    parts = sorted((job.out / "data").glob("*.parquet"))
    assert len(parts) > 3
    for part in parts[2:]:
        part.unlink()
    kept = {part: part.stat().st_mtime_ns for part in parts[:2]}
    num_kept = len(job.ids("data"))

    code, printed = job.run(num_actors=2, num_gpus_per_actor=0.5)
    assert code == 0
    assert f"resuming: {num_kept} of {job.NUM_ROWS} rows are already in" in printed
    assert sorted(job.ids("data")) == complete
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert job.facts()["generated_rows"] == job.NUM_ROWS - num_kept

    before = sorted((job.out / "data").iterdir())
    code, printed = job.run()
    assert code == 0
    assert "nothing to do" in printed
    assert sorted((job.out / "data").iterdir()) == before
    with pytest.raises(UserError, match=r"belongs to a different job .*: sampling was"):
        job.run(max_tokens=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_actors": 3, "num_gpus_per_actor": 1}, "num_gpus_per_actor: asked for 3 x 1 GPUs, the cluster has 2"),
        ({"max_model_len": 100_000}, "max_model_len must be at most the model's"),
    ],
)
def test_what_only_the_cluster_or_the_engine_can_know_is_still_one_line(
    job: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        job.run(**settings)
    assert "\n" not in str(error.value)
    assert not (job.out / "_SUCCESS").exists()
    assert json.loads((job.out / "_job.json").read_text())["input_rows"] == job.NUM_ROWS
