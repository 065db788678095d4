"""What is in an output's committed parts: the rows that need no more work, and what was tried before."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from tide_ray.data.manifest import read_parts
from tide_ray.data.parts import DATA_FOLDER, ERRORS_FOLDER
from tide_ray.data.schema import ATTEMPTS_COLUMN
from tide_ray.data.storage import StoragePath

RETRIED_FOLDER = "_retried"


@dataclass(frozen=True, slots=True)
class Committed:
    """Row ids that need no more work, by where they are, and the number of rows that hold them."""

    data: set[str]
    errors: set[str]
    num_rows: int

    @property
    def ids(self) -> set[str]:
        return self.data | self.errors

    @property
    def num_ids(self) -> int:
        return len(self.data) + len(self.errors - self.data)


def read_committed(folder: StoragePath) -> Committed:
    """The ids in committed parts. Raises UserError for a part that cannot be read."""
    data, num_results = _row_ids(folder, DATA_FOLDER)
    errors, num_errors = _row_ids(folder, ERRORS_FOLDER)
    return Committed(data, errors, num_results + num_errors)


def past_attempts(folder: StoragePath) -> dict[str, int]:
    """How often rows that are tried again ended as an error before, by id."""
    attempts: dict[str, int] = {}
    for table in read_parts(folder, RETRIED_FOLDER, ["row_id", ATTEMPTS_COLUMN]):
        for row_id, count in zip(*(column.to_pylist() for column in table.columns), strict=True):
            attempts[row_id] = max(count, attempts.get(row_id, 0))
    return attempts


def tokens_and_depths(folder: StoragePath) -> tuple[int, float]:
    """Generated tokens, and the sum of their depths, over all committed rows."""
    tokens, depths = 0, 0.0
    for table in read_parts(folder, DATA_FOLDER, ["num_generated_tokens", "mean_exit_layer"]):
        counts = table["num_generated_tokens"].cast(pa.float64())
        tokens += pc.sum(table["num_generated_tokens"]).as_py()
        depths += pc.sum(pc.multiply(counts, table["mean_exit_layer"])).as_py()
    return tokens, depths


def _row_ids(folder: StoragePath, kind: str) -> tuple[set[str], int]:
    ids: set[str] = set()
    num_rows = 0
    for table in read_parts(folder, kind, ["row_id"]):
        ids.update(table["row_id"].to_pylist())
        num_rows += table.num_rows
    return ids, num_rows
