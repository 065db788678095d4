"""Rows that cannot be answered: kept with their reason, limited in number, and tried again when asked."""

from __future__ import annotations

from typing import Any

import pytest

from tide_ray.data.verify import verify_job
from tide_ray.types import JobError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_cluster")]


def bad_and_good_rows(job: Any) -> list[dict[str, Any]]:
    rows = [job.row(i) for i in range(24)]
    rows[3] = {"prompt": "too long " * 40}
    rows[9] = {"prompt": ""}
    rows[14] = {"prompt_token_ids": [1, 2], "sampling_params": {"top_p": 7}}
    rows[15] = {"prompt_token_ids": [3, 10**6]}
    rows[20] = {"messages": [{"role": "user", "content": ["not", "text"]}]}
    return rows


def test_every_kind_of_bad_row_is_kept_with_its_reason_and_can_be_tried_again(job: Any) -> None:
    job.write_prompts(bad_and_good_rows(job))
    assert job.run()[0] == 3
    errors = {row["row_id"]: row for row in job.rows("errors")}
    reasons = {(row["input"] or "")[:20]: (row["stage"], row["error"], row["attempts"]) for row in errors.values()}
    stage, error, _ = reasons["too long too long to"]
    assert (stage, error[:59]) == ("generate", "prompt must have at most 127 tokens (max_model_len 128), go")
    assert (None, "prompt is empty", "input") in {(row["input"], row["error"], row["stage"]) for row in errors.values()}
    assert reasons["[1, 2]"] == ("input", "top_p must be in (0, 1], got 7", 1)
    assert reasons["[3, 1000000]"][1].startswith("prompt: token id must be from 0 to ")
    assert reasons['[{"role": "user", "c'][0] == "generate"
    assert len(job.ids("data")) == 19
    answered = sorted(job.rows("data"), key=lambda row: row["row_id"])
    assert verify_job(job.out).problems == []

    code, printed = job.run(retry_errors=True)
    assert code == 3
    assert "trying 5 rejected rows again" in printed
    assert job.facts()["generated_rows"] == 3, "a row that never reaches an engine is not given to one"
    again = {row["row_id"]: row for row in job.rows("errors")}
    assert {row_id: row["attempts"] for row_id, row in again.items()} == {
        row_id: 1 if row["stage"] == "input" else 2 for row_id, row in errors.items()
    }
    assert sorted(job.rows("data"), key=lambda row: row["row_id"]) == answered
    assert verify_job(job.out).problems == []


def test_a_job_with_more_errors_than_allowed_stops_and_goes_on_when_they_are_allowed(job: Any) -> None:
    job.write_prompts(bad_and_good_rows(job))
    with pytest.raises(JobError, match=r"max_errors: [0-9] rows are rejected, more than the 1 allowed"):
        job.run(max_errors=1)
    assert not (job.out / "_SUCCESS").exists()
    with pytest.raises(JobError, match="more than the 2 allowed"):
        job.run(max_errors=0.1)
    assert job.run(max_errors=5)[0] == 3
    assert sorted(job.ids("data") + job.ids("errors")) == sorted(job.ids("_input"))
    assert job.run(max_errors=1)[0] == 3, "a finished job stays finished"


def test_another_job_can_start_beside_the_one_that_is_there(job: Any) -> None:
    job.write_prompts([job.row(i) for i in range(6)])
    assert job.run()[0] == 0
    before = sorted(job.out.rglob("*.parquet"))
    code, printed = job.run(max_tokens=9, force_new_run=True)
    assert code == 0
    assert f"this one is in {job.out}-2" in printed
    assert sorted(job.out.rglob("*.parquet")) == before
    assert verify_job(f"{job.out}-2").num_results == 6
    assert "nothing to do" in job.run(max_tokens=9, force_new_run=True)[1]
