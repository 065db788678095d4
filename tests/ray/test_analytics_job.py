"""What a real job left, with exits: its report agrees with the engines' own counters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exit_helpers import make_routers
from tide_ray.analytics import load
from tide_ray.analytics.report import make_report, write_report
from tide_ray.config import EngineConfig
from tide_ray.models.loading import load_as

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_cluster")]


def test_views_and_report_agree_with_the_jobs_own_facts(job: Any, tmp_path: Path) -> None:
    settings = EngineConfig(dtype="float32", device="cpu")
    make_routers(load_as(str(job.model), settings), (2, 3)).save(tmp_path / "routers")
    rows = [job.row(i) for i in range(job.NUM_ROWS)]
    rows[4] = {"prompt": "too long " * 40}
    job.write_prompts(rows)
    exits = {"exits": str(tmp_path / "routers"), "exit_threshold": 0.5, "exits_when": "always"}
    assert job.run(keep_columns=["label"], rows_per_part=8, **exits)[0] == 3
    facts, data = job.facts(), job.rows("data")

    with load(job.out) as analytics:
        report = make_report(analytics)
        assert analytics.notes == []
        assert analytics.records("SELECT model, boundaries, rows, errors FROM run") == [
            {"model": str(job.model), "boundaries": [2, 3], "rows": job.NUM_ROWS - 1, "errors": 1}
        ]
    (run,) = report.runs
    assert set(run["depths"]) == {2, 3, 4}, "gates of random weights let some tokens go"
    assert {str(depth): count for depth, count in run["depths"].items()} == facts["counters"]["tokens_at_depth"]
    assert run["totals"]["tokens"] == facts["tokens"]
    assert sum(depth * n for depth, n in run["depths"].items()) / facts["tokens"] == pytest.approx(
        facts["mean_depth"], abs=1e-4
    )
    through = facts["counters"]["rows_through_layer"]
    assert run["savings"]["all_rows"]["saved"] == through[0] * 4 - sum(through) > 0
    assert run["savings"]["time"]["ceiling"] > 1
    assert run["savings"]["why_no_time"] == ""
    assert [one["rows"] for one in run["savings"]["stages"]] == [through[0], through[2], through[3]]
    assert run["num_errors"] == 1

    # The clock of the rows is the job's.
    assert all(row["finished_at"] is not None for row in data)
    assert run["over_time"]["seconds"] == pytest.approx(facts["generation_seconds"], abs=1.0)
    assert max(run["over_time"]["residents"]) <= job.LIMITS["max_num_seqs"] * facts["num_actors"] + 0.01
    sampled = report.samples["out"][0]
    assert [depth for _, depth in sampled["pieces"]] == next(
        row["exit_layers"] for row in data if row["row_id"] == sampled["row_id"]
    )
    assert write_report(tmp_path / "page.html", report).stat().st_size > 50_000
