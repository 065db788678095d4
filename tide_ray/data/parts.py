"""Part files: complete from the moment they can be seen.

A part is written in a scratch folder of its attempt, fsynced and renamed into ``data/`` or ``errors/``. The file itself
is the commit record: a killed job leaves only whole parts behind. The next attempt removes the scratch folder before it
looks at what is committed, so a writer that outlived its job has nothing left to rename.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tide_ray.data.schema import (
    ERROR_COLUMN,
    ERROR_SCHEMA,
    KEPT_PREFIX,
    OPTIONAL_SCHEMA,
    OUTPUT_SCHEMA,
    with_metadata,
)

DATA_FOLDER = "data"
ERRORS_FOLDER = "errors"


def output_table(block: pa.Table) -> pa.Table:
    """The successful rows of a processed block, in the output schema with optional and kept columns behind."""
    rows = block.filter(pc.equal(block[ERROR_COLUMN], ""))
    kept = [name for name in block.column_names if name.startswith(KEPT_PREFIX)]
    ours = [*OUTPUT_SCHEMA, *(field for field in OPTIONAL_SCHEMA if field.name in block.column_names)]
    columns = [rows[item.name].cast(item.type) for item in ours] + [rows[name] for name in kept]
    fields = [*ours, *(pa.field(name.removeprefix(KEPT_PREFIX), block[name].type) for name in kept)]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def error_table(block: pa.Table) -> pa.Table:
    """The rejected rows of a processed block, in the error schema."""
    rows = block.filter(pc.not_equal(block[ERROR_COLUMN], ""))
    return make_error_table(rows["row_id"], rows[ERROR_COLUMN], rows["prompt"], stage="generate")


def make_error_table(row_ids: Any, errors: Any, prompts: Any, *, stage: str) -> pa.Table:
    """An error table from columns of equal length."""
    count = len(row_ids)
    columns = [row_ids, [stage] * count, errors, [1] * count, prompts]
    arrays = [
        column.cast(item.type) if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column, item.type)
        for column, item in zip(columns, ERROR_SCHEMA, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=ERROR_SCHEMA)


def write_part(scratch: Path, target: Path, tables: Sequence[pa.Table], facts: Mapping[str, Any]) -> None:
    """Commit ``tables`` as the file ``target``, or nothing when they hold no rows.

    ``scratch`` is on the same filesystem and must exist: it is not made here.
    """
    table = pa.concat_tables(tables).combine_chunks()
    if table.num_rows == 0:
        return
    temporary = scratch / f"{target.name}.{uuid.uuid4().hex}"
    target.parent.mkdir(exist_ok=True)
    try:
        pq.write_table(table.cast(with_metadata(table.schema, facts)), temporary, compression="zstd")
        commit_file(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def commit_file(temporary: Path, target: Path) -> None:
    """Make ``temporary`` durable, then visible as ``target`` in one step. Both are on one filesystem."""
    _fsync(temporary)
    os.replace(temporary, target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
