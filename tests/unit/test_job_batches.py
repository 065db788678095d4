"""How many rows a job puts into a batch: batches cost the driver memory, and large ones keep actors waiting."""

from __future__ import annotations

from typing import Any

import pytest

from tide_ray.data.generation import BATCHES_PER_JOB, MAX_BATCH_SIZE, rows_per_batch
from tide_ray.data.job_config import GenerateJobConfig


@pytest.mark.parametrize(
    ("settings", "num_rows", "expected"),
    [
        ({}, 2_000, 32),
        ({}, 100_000, 32),
        ({}, 64 * BATCHES_PER_JOB, 64),
        ({}, 1_000_000, MAX_BATCH_SIZE),
        ({}, 10_000_000, MAX_BATCH_SIZE),
        ({"batch_size": 8}, 1_000_000, 8),
        ({"num_actors": 4}, 40, 10),
        ({"num_actors": 2, "max_actors": 8}, 40, 5),
        ({"batch_size": 256}, 3, 3),
        ({}, 0, 1),
    ],
)
def test_rows_of_a_batch(settings: dict[str, Any], num_rows: int, expected: int) -> None:
    assert rows_per_batch(GenerateJobConfig.build(settings), num_rows) == expected
