"""The job end to end: real Ray, two actors on fake GPUs, the real engine on a tiny model."""

from __future__ import annotations

import json
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data import DataContext

from tide_ray.config import EngineConfig
from tide_ray.data.schema import ERROR_SCHEMA, OUTPUT_SCHEMA
from tide_ray.engine.engine import TideEngine
from tide_ray.types import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_cluster")]


def test_two_actors_answer_every_row_once_as_the_bare_engine_does(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine the first actor could have answered every row before the second one is up.
    monkeypatch.setattr(DataContext.get_current(), "wait_for_min_actors_s", 120)
    code, printed = job.run(num_actors=2, num_gpus_per_actor=1, keep_columns=["label"])
    assert code == 0
    order = {row["row_id"]: row["row_index"] for row in job.rows("_input")}
    rows = sorted(job.rows("data"), key=lambda row: order[row["row_id"]])
    assert [row["row_id"] for row in rows] == list(order)
    assert [row["label"] for row in rows] == [f"label {i}" for i in range(job.NUM_ROWS)]
    assert not (job.out / "errors").exists()

    engine = TideEngine.from_pretrained(str(job.model), EngineConfig(**job.LIMITS, selfcheck=False))
    for i, row in enumerate(rows):
        given = job.row(i)
        messages = given.get("messages") or [{"role": "user", "content": given["prompt"]}]
        params = SamplingParams(temperature=0, ignore_eos=True, **given["sampling_params"])
        expected = engine.generate(messages, params)[0].outputs[0]
        assert row["generated_tokens"] == expected.token_ids
        assert row["generated_text"] == expected.text
        assert row["exit_layers"] == [engine.num_layers] * len(expected.token_ids)
        assert len(row["token_times_us"]) == len(expected.token_ids) == row["num_generated_tokens"]
        assert row["prompt"] == (given.get("prompt") or json.dumps(given["messages"]))
        assert row["finish_reason"] == "length"

    run = job.facts()
    assert (run["rows"], run["errors"], run["num_actors"]) == (job.NUM_ROWS, 0, 2)
    assert run["tokens"] == sum(row["num_generated_tokens"] for row in rows) == run["generated_tokens"]
    assert run["mean_depth"] == engine.num_layers
    # Prompt rows that were not cached and all but the last token of each answer went through every layer, over both
    # actors.
    rows_run = sum(row["num_input_tokens"] + row["num_generated_tokens"] - 1 for row in rows)
    assert len(run["actors"]) == 2
    assert all(actor["startup_seconds"] > 0 for actor in run["actors"])
    assert any(actor.get("peak_rss_bytes", 0) > 2**28 for actor in run["actors"]), "torch alone takes that"
    num_cached = run["counters"]["num_cached_tokens"]
    assert run["counters"]["rows_through_layer"] == [rows_run - num_cached] * engine.num_layers
    assert run["engine"]["device"] == "cpu"
    for text in ("tokens/s", "mean depth", str(job.NUM_ROWS)):
        assert text in printed


def test_a_shared_system_prompt_is_computed_once_and_changes_no_answer(job: Any) -> None:
    options = {"system_prompt": "Answer in one short word. " * 3, "batch_size": job.NUM_ROWS, "max_num_seqs": 4}
    code, printed = job.run(prefix_caching=False, **options)
    assert code == 0
    plain, run = {row["row_id"]: row["generated_tokens"] for row in job.rows("data")}, job.facts()
    assert (run["prefix_hit_rate"], run["engine"]["prefix_caching"]) == (0.0, False)
    assert "prompt from cache" not in printed
    num_input = run["counters"]["num_prompt_tokens"]

    job.out = job.out.with_name("shared")
    code, printed = job.run(**options)
    assert code == 0
    rows, run = job.rows("data"), job.facts()
    assert {row["row_id"]: row["generated_tokens"] for row in rows} == plain
    assert run["counters"]["num_prompt_tokens"] == sum(row["num_input_tokens"] for row in rows) == num_input
    # All rows but one find the two whole pages of 32 tokens in the system prompt's 80.
    assert run["counters"]["num_cached_tokens"] >= 64 * (job.NUM_ROWS - 1)
    assert run["prefix_hit_rate"] == round(run["counters"]["num_cached_tokens"] / num_input, 4)
    assert f"{run['prefix_hit_rate']:.1%}" in printed


def test_rejected_rows_go_to_errors_and_their_neighbours_are_answered(job: Any) -> None:
    rows = [job.row(i) for i in range(8)]
    rows[2] = {"prompt": "too long " * 40}
    rows[5] = {"prompt": "bad", "sampling_params": {"temperature": "hot"}}
    job.write_prompts(rows, tail="{torn\n")
    code, printed = job.run(batch_size=8, rows_per_part=2, keep_columns=["label"])
    assert code == 3
    assert "errors" in printed
    assert len(job.rows("data")) == 6
    errors = {row["input"]: row for row in job.rows("errors")}
    assert "prompt must have at most 127 tokens" in errors["too long " * 40]["error"]
    assert errors["too long " * 40]["stage"] == "generate"
    assert errors["bad"]["error"] == "temperature must be a number, got 'hot'"
    assert errors["bad"]["stage"] == "input"
    assert "line 9 is not JSON" in errors["{torn"]["error"]

    for part in (job.out / "data").glob("*.parquet"):
        schema = pq.read_schema(part)
        assert schema.remove_metadata() == pa.schema([*OUTPUT_SCHEMA, pa.field("label", pa.string())])
        assert schema.metadata[b"tide_ray.policy"] == b"full"
        assert schema.metadata[b"tide_ray.device"] == b"cpu"
    for part in (job.out / "errors").glob("*.parquet"):
        assert pq.read_schema(part).remove_metadata() == ERROR_SCHEMA
    query = f"select sum(len(exit_layers)), any_value(typeof(exit_layers)) from '{job.out}/data/*.parquet'"
    assert duckdb.sql(query).fetchall() == [(3 + 4 + 6 + 7 + 3 + 4, "SMALLINT[]")]
    assert {path.name for path in job.out.iterdir()} == {
        "_SUCCESS", "_input", "_job.json", "_lock.guard", "_manifest.json", "data", "errors", "run.json",
    }  # fmt: skip

    code, printed = job.run(batch_size=8, keep_columns=["label"])
    assert code == 3
    assert "nothing to do" in printed
    assert job.run(batch_size=8, keep_columns=["label"], rejected_rows_ok=True)[0] == 0
