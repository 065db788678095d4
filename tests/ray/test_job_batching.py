"""Rows of many Ray Data batches share one engine, and how they are batched does not change an answer."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_cluster")]


def test_more_rows_are_resident_than_a_batch_has(job: Any) -> None:
    """Refill crosses Ray Data batches: alone, batches of 2 rows x 16 tokens would take at least 16 steps each."""
    job.write_prompts([{"prompt": f"p{i}"} for i in range(32)])
    assert job.run(batch_size=2, max_tokens=16)[0] == 0
    run = job.facts()
    assert run["generated_tokens"] == 32 * 16
    one_batch_at_a_time = 16 * 16
    eight_residents = 32 * 16 // 8
    assert eight_residents <= run["counters"]["num_steps"] < one_batch_at_a_time / 2


def test_sampled_rows_do_not_depend_on_actors_and_batches(job: Any) -> None:
    answers = []
    for name, settings in (("one", {"num_actors": 1, "batch_size": 4}), ("two", {"num_actors": 2, "batch_size": 3})):
        job.out = job.out.with_name(name)
        assert job.run(temperature=1.0, seed=3, limit=12, num_gpus_per_actor=0.0, **settings)[0] == 0
        answers.append({row["row_id"]: row["generated_tokens"] for row in job.rows("data")})
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens in answers[0].values()}) > 6
