"""Ray Data's write tasks: each commits one part of results and one of errors; a retried task writes no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray.data import Datasink
from ray.data.block import Block, BlockAccessor

from tide_ray.data.adoption import own_prefix
from tide_ray.data.parts import DATA_FOLDER, ERRORS_FOLDER, error_table, output_table, write_part
from tide_ray.data.storage import storage_path


class ParquetSink(Datasink[dict[str, int]]):
    """Writes result rows to ``data/`` and rejected rows to ``errors/``.

    Args:
        output: the job's folder.
        scratch: a folder of this attempt in the same place; see ``parts``.
        attempt: unique to this run of the job, part of every file name.
        rows_per_part: rows to gather before a part is written.
        facts: run facts for the files' metadata.
        late_facts: further facts that are known only once an engine is up; called in the write task.
    """

    def __init__(
        self,
        output: str,
        *,
        scratch: str,
        attempt: str,
        rows_per_part: int,
        facts: Mapping[str, Any],
        late_facts: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        self._output = storage_path(output, "output")
        self._scratch = storage_path(scratch, "output")
        self._attempt = attempt
        self._rows_per_part = rows_per_part
        self._facts = dict(facts)
        self._late_facts = late_facts

    @property
    def min_rows_per_write(self) -> int:
        return self._rows_per_part

    def write(self, blocks: Iterable[Block], ctx: Any) -> dict[str, int]:
        """Write one task's blocks as at most one part of each kind. Returns the numbers of rows."""
        tables = [table for block in blocks if (table := BlockAccessor.for_block(block).to_arrow()).num_rows]
        if not tables:
            return {"rows": 0, "errors": 0}
        facts = {**self._facts, **(self._late_facts() if self._late_facts else {})}
        name = f"{own_prefix(self._attempt)}{ctx.task_idx:06d}.parquet"
        results = [output_table(table) for table in tables]
        rejected = [error_table(table) for table in tables]
        for folder, parts in ((DATA_FOLDER, results), (ERRORS_FOLDER, rejected)):
            write_part(self._scratch, self._output / folder / name, parts, facts)
        return {"rows": sum(t.num_rows for t in results), "errors": sum(t.num_rows for t in rejected)}
