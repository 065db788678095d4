"""The analytics benchmark end to end: what it writes and what it measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_analytics
import pyarrow.parquet as pq
import pytest

from programs import benchmarked, measured
from tide_ray.analytics import load
from tide_ray.data.parts import is_intact
from tide_ray.data.schema import OUTPUT_SCHEMA


@pytest.mark.slow
def test_every_analysis_is_measured_at_every_size(tmp_path: Path, tiny_llama_folder: Path) -> None:
    written = tmp_path / "analytics.json"
    report = measured(
        "analytics", "--tokens", "3000", "--model", tiny_llama_folder, "--num-threads", 1, "--output", written
    )
    assert "peak MB" in report.pop("printed")
    assert json.loads(written.read_text()) == report
    (size,) = report["sizes"]
    assert (size["rows"], size["files"]) == (30, 1)
    assert 2000 < size["tokens"] < 4000
    rows = {row["name"]: row for row in size["measured"]}
    assert rows["every token to Parquet"]["rows"] == size["tokens"]
    assert rows["tokens: count and time by depth"]["rows"] == 3
    assert all(5e7 < row["peak_rss_bytes"] < 4e9 and row["seconds"] > 0 for row in rows.values())
    assert "report" in rows


def test_made_up_output_is_of_the_jobs_own_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_analytics, "ROWS_PER_FILE", 40)
    monkeypatch.setattr(bench_analytics, "ROWS_PER_GROUP", 16)
    facts = bench_analytics.write_output(tmp_path / "out", 10_000, "no model")
    files = sorted((tmp_path / "out" / "data").iterdir())
    assert (facts["rows"], facts["files"], len(files)) == (100, 3, 3)
    metadata = [pq.read_metadata(file) for file in files]
    assert [one.num_row_groups for one in metadata] == [3, 3, 2]
    assert all(is_intact(file, one) for file, one in zip(files, metadata, strict=True))
    rows: list[dict[str, Any]] = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert pq.read_schema(files[0]).remove_metadata() == OUTPUT_SCHEMA
    assert len({row["row_id"] for row in rows}) == 100
    assert sum(row["num_generated_tokens"] for row in rows) == facts["tokens"]
    for row in rows:
        assert len(row["exit_layers"]) == len(row["token_times_us"]) == row["num_generated_tokens"]
        assert row["exit_layers"][0] == bench_analytics.NUM_LAYERS
        assert sum(row["token_times_us"]) == row["total_time_us"]
    with load(tmp_path / "out") as analytics:
        assert analytics.records("SELECT is_finished, tokens FROM run") == [
            {"is_finished": True, "tokens": facts["tokens"]}
        ]


def test_sizes_that_are_no_numbers_are_refused() -> None:
    done = benchmarked("analytics", "--tokens", "many")
    assert (done.exit_code, done.stderr) == (
        2, "error: tokens must be positive integers separated by commas, got 'many'\n",
    )  # fmt: skip
