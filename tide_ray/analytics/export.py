"""Results of queries as CSV, JSON lines, Parquet or a table, batch by batch: millions of rows take little memory."""

from __future__ import annotations

import datetime
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tide_ray.config import check_choice
from tide_ray.files import appearing, local_path
from tide_ray.types import UserError

MAX_TABLE_ROWS = 1000
"""Rows that a table shows; the other formats have all."""
MAX_CELL = 200
SUFFIXES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}

Write = Callable[[pa.RecordBatchReader, BinaryIO], None]


def write_csv(reader: pa.RecordBatchReader, stream: BinaryIO) -> None:
    """CSV with a header; lists and structs as JSON."""
    schema = pa.schema([pa.field(c.name, pa.string() if _is_nested(c.type) else c.type) for c in reader.schema])
    with pyarrow.csv.CSVWriter(stream, schema) as writer:
        for batch in reader:
            writer.write_batch(pa.RecordBatch.from_arrays(list(map(_flat, batch.columns)), schema=schema))


def write_json(reader: pa.RecordBatchReader, stream: BinaryIO) -> None:
    """An object a line; NaN and infinities, which JSON does not have, are null."""
    for batch in reader:
        stream.write("".join(f"{_json(row)}\n" for row in batch.to_pylist()).encode())


def write_parquet(reader: pa.RecordBatchReader, stream: BinaryIO) -> None:
    """Parquet, a row group for each batch."""
    with pq.ParquetWriter(stream, reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch)


def write_table(reader: pa.RecordBatchReader, stream: BinaryIO) -> None:
    """The first rows for people to read."""
    table = Table()
    for column in reader.schema:
        is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        table.add_column(Text(column.name), justify="right" if is_number else "left", overflow="fold")
    num_rows, has_more = 0, False
    for batch in reader:
        for row in batch.slice(0, MAX_TABLE_ROWS - num_rows).to_pylist():
            table.add_row(*(Text(_cell(value)) for value in row.values()))
        num_rows += batch.num_rows
        if has_more := num_rows > MAX_TABLE_ROWS:
            break
    text = io.StringIO()
    console = Console(file=text, width=shutil.get_terminal_size((200, 24)).columns)
    console.print(table)
    if has_more:
        console.print(f"the first {MAX_TABLE_ROWS:,} rows; --format csv, json or parquet has all", highlight=False)
    stream.write(text.getvalue().encode())


WRITERS: dict[str, Write] = {"table": write_table, "csv": write_csv, "json": write_json, "parquet": write_parquet}


def choose_format(name: str | None, output: str | None) -> str:
    """The format asked for, else what the file's name says, else a table.

    Raises:
        UserError: there is no such format, or it needs a file.
    """
    chosen = name or SUFFIXES.get(Path(output or "").suffix, "table")
    check_choice("format", chosen, WRITERS)
    if chosen == "parquet" and output is None:
        raise UserError("format: parquet needs --output FILE, got 'parquet'")
    return chosen


@contextmanager
def whole_file(output: str) -> Iterator[BinaryIO]:
    """A stream whose file appears complete or not at all. Raises UserError where it cannot be written."""
    try:
        with appearing(local_path(output, "output")) as unfinished, unfinished.open("wb") as stream:
            yield stream
    except OSError as error:
        raise UserError(f"output: cannot write {output!r}: {error.strerror or error}") from None


def _is_nested(kind: pa.DataType) -> bool:
    return pa.types.is_nested(kind)


def _flat(column: pa.Array) -> pa.Array:
    if not _is_nested(column.type):
        return column
    return pa.array([None if value is None else _json(value) for value in column.to_pylist()], pa.string())


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """``value`` as JSON knows it."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = _json(value) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]}..."
