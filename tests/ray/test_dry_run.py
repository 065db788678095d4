"""``--dry-run``: what the job would take, and nothing written."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tide_ray.types import UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_cluster")]


def test_a_dry_run_says_what_the_job_would_take_and_writes_nothing(job: Any) -> None:
    rows = [job.row(i) for i in range(300)]
    job.write_prompts(rows, tail="{torn\n")
    code, printed = job.run(dry_run=True, hourly_cost=3600.0)
    assert code == 0
    assert not job.out.exists()
    lines = dict(re.findall(r"│ (\S.*?)\s+│\s+(\S.*?) │", printed))
    assert lines["rows"] == "301, 1 of them unusable"
    assert lines["blocks"] == "76 of 4 rows"
    assert lines["rejected in the probe"] == "0 of 60"
    asked = sum(row["sampling_params"]["max_tokens"] for row in rows)
    told = int(lines["answer tokens"].removeprefix("about ").replace(",", ""))
    assert told == pytest.approx(asked, rel=0.1)
    assert lines["resident sequences"] == "8 of 128 tokens at most"
    assert lines["expected time"].endswith(" s")
    assert float(lines["expected cost"].removeprefix("about ").replace(",", "")) > 0


def test_what_the_engine_refuses_is_told_by_a_dry_run_in_one_line(job: Any) -> None:
    with pytest.raises(UserError, match="max_model_len must be at most the model's") as error:
        job.run(dry_run=True, max_model_len=100_000)
    assert "\n" not in str(error.value)
    assert not job.out.exists()
