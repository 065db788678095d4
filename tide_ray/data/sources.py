"""Streaming readers: JSON Lines, Parquet, CSV, text and HuggingFace data sets, as batches of rows.

A source that cannot be read at all is a UserError; a single bad line is a row with a ``problem`` and the rest goes on.
Nothing here knows what a prompt is.
"""

from __future__ import annotations

import gzip
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from tide_ray.data.reading import for_arrow
from tide_ray.data.storage import StoragePath
from tide_ray.messages import one_line
from tide_ray.types import UserError

ROWS_PER_BATCH = 1024
ROWS_TO_PEEK = 100
BYTES_TO_PEEK = 4096
TEXT_COLUMN = "text"


@dataclass(slots=True)
class SourceRow:
    """One row: ``values`` by column, ``place`` for messages; an unreadable one has ``problem`` and its ``raw`` text."""

    values: dict[str, Any]
    place: str
    problem: str = ""
    raw: str | None = None


@dataclass(slots=True)
class SourceBatch:
    """Rows, and the columns to keep as an Arrow table of the same length."""

    rows: list[SourceRow]
    kept: pa.Table = field(default_factory=lambda: pa.table({}))


class Source(Protocol):
    """One file or data set. ``columns`` are the names a user can choose from."""

    name: str
    is_text: bool

    @property
    def columns(self) -> list[str]: ...

    def schema(self, columns: Sequence[str] | None) -> pa.Schema:
        """Arrow types of ``columns``, of all columns for None. Columns that no row has are left out."""

    def batches(self, columns: Sequence[str], kept: pa.Schema) -> Iterator[SourceBatch]:
        """Rows with ``columns`` in ``values`` and ``kept`` (missing ones null) beside them."""


class ArrowSource:
    """A source with a schema: Parquet, CSV, a HuggingFace data set."""

    is_text = False

    def __init__(self, name: str, schema: pa.Schema, open_tables: Callable[[list[str]], Iterator[pa.Table]]) -> None:
        self.name = name
        self._schema = schema
        self._open_tables = open_tables

    @property
    def columns(self) -> list[str]:
        return list(self._schema.names)

    def schema(self, columns: Sequence[str] | None) -> pa.Schema:
        return pa.schema([item for item in self._schema if columns is None or item.name in columns])

    def batches(self, columns: Sequence[str], kept: pa.Schema) -> Iterator[SourceBatch]:
        available = set(self._schema.names)
        wanted = [name for name in columns if name in available]
        needed = list(dict.fromkeys([*wanted, *(name for name in kept.names if name in available)]))
        position = 0
        try:
            for table in self._open_tables(needed):
                records = table.select(wanted).to_pylist() if wanted else [{} for _ in range(table.num_rows)]
                rows = [SourceRow(record, f"{self.name} row {position + i}") for i, record in enumerate(records)]
                position += len(rows)
                yield SourceBatch(rows, conform(table, kept))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"prompts: cannot read {self.name!r}: {one_line(error)}") from None


class LineSource:
    """A source of lines: JSON Lines, or text with one prompt per non-empty line. ``.gz`` files are unpacked."""

    def __init__(self, path: StoragePath, *, is_text: bool) -> None:
        self.name = str(path)
        self.is_text = is_text
        self._path = path
        _check_readable(path)

    def starts_an_array(self) -> bool:
        """Whether the file is one JSON array, as far as its first character tells."""
        with self._open() as stream:
            return stream.read(BYTES_TO_PEEK).removeprefix(BOM_UTF8).lstrip().startswith(b"[")

    @property
    def columns(self) -> list[str]:
        rows = islice((row for row in self._rows() if not row.problem), ROWS_TO_PEEK)
        return list(dict.fromkeys(name for row in rows for name in row.values))

    def schema(self, columns: Sequence[str] | None) -> pa.Schema:
        schemas = []
        for rows in _chunks(self._rows()):
            names = columns if columns is not None else list(dict.fromkeys(name for row in rows for name in row.values))
            fields = []
            for name in names:
                values = [row.values.get(name) for row in rows]
                if any(name in row.values for row in rows):
                    fields.append(pa.field(name, self._infer_type(name, values)))
            schemas.append(pa.schema(fields))
        try:
            merged = pa.unify_schemas(schemas, promote_options="permissive") if schemas else pa.schema([])
        except pa.ArrowException as error:
            raise UserError(f"keep_columns: {self.name!r} mixes types: {one_line(error)}") from None
        # A column that is null in every row has no type to keep; a string column stays readable everywhere.
        return pa.schema([item.with_type(pa.string()) if pa.types.is_null(item.type) else item for item in merged])

    def batches(self, columns: Sequence[str], kept: pa.Schema) -> Iterator[SourceBatch]:
        for rows in _chunks(self._rows()):
            records = [{name: row.values.get(name) for name in kept.names} for row in rows]
            yield SourceBatch(rows, pa.Table.from_pylist(records, schema=kept) if kept.names else pa.table({}))

    def _infer_type(self, name: str, values: list[Any]) -> pa.DataType:
        try:
            return pa.array(values).type
        except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
            raise UserError(f"keep_columns: column {name!r} of {self.name!r}: {one_line(error)}") from None

    def _rows(self) -> Iterator[SourceRow]:
        with self._open() as stream:
            for number, line in enumerate(stream, start=1):
                if row := self._parse(line, number):
                    yield row

    @contextmanager
    def _open(self) -> Iterator[BinaryIO | gzip.GzipFile]:
        try:
            with self._path.open("rb") as stream:
                if self._path.suffix == ".gz":
                    with gzip.open(stream, "rb") as unpacked:
                        yield unpacked
                else:
                    yield stream
        except (OSError, EOFError) as error:
            raise UserError(f"prompts: cannot read {self.name!r}: {one_line(error)}") from None

    def _parse(self, line: bytes, number: int) -> SourceRow | None:
        place = f"{self.name} line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
        except UnicodeDecodeError:
            return SourceRow({}, place, f"line {number} is not UTF-8 text", line.decode("utf-8", "replace").strip())
        if not text.strip():
            return None
        if self.is_text:
            return SourceRow({TEXT_COLUMN: text}, place)
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            return SourceRow({}, place, f"line {number} is not JSON: {error}", text)
        if not isinstance(values, dict):
            return SourceRow({}, place, f"line {number} is not a JSON object", text)
        return SourceRow(values, place)


def parquet_source(path: StoragePath) -> ArrowSource:
    """A Parquet file, read a batch at a time."""
    _check_readable(path)
    try:
        schema = pq.read_schema(for_arrow(path))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"prompts: {str(path)!r} is not a Parquet file: {one_line(error)}") from None

    def open_tables(columns: list[str]) -> Iterator[pa.Table]:
        with pq.ParquetFile(for_arrow(path)) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=columns):
                yield pa.Table.from_batches([batch])

    return ArrowSource(str(path), schema.remove_metadata(), open_tables)


def csv_source(path: StoragePath, text_columns: Sequence[str] = ()) -> ArrowSource:
    """A CSV (or tab-separated) file with a header line; an empty field is null."""
    _check_readable(path)
    parse = pa.csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True)
    # Prompts and ids stay the text they are in the file, also where every one of them happens to be a number.
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(text_columns, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )

    def open_reader() -> pa.csv.CSVStreamingReader:
        file = for_arrow(path, is_sequential=True)
        return pa.csv.open_csv(file, parse_options=parse, convert_options=convert)

    try:
        with open_reader() as reader:
            schema = reader.schema
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"prompts: {str(path)!r} is not a CSV file: {one_line(error)}") from None

    def open_tables(columns: list[str]) -> Iterator[pa.Table]:
        with open_reader() as reader:
            for batch in reader:
                table = pa.Table.from_batches([batch]).select(columns)
                for start in range(0, table.num_rows, ROWS_PER_BATCH):
                    yield table.slice(start, ROWS_PER_BATCH)

    return ArrowSource(str(path), schema, open_tables)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """``table`` with exactly the columns and types of ``schema``; columns it lacks are null."""
    columns = [
        table[item.name].cast(item.type) if item.name in table.column_names else pa.nulls(table.num_rows, item.type)
        for item in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _check_readable(path: StoragePath) -> None:
    try:
        with path.open("rb"):
            return
    except OSError as error:
        raise UserError(f"prompts: cannot read {str(path)!r}: {error.strerror}") from None


def _chunks(rows: Iterator[SourceRow]) -> Iterator[list[SourceRow]]:
    while chunk := list(islice(rows, ROWS_PER_BATCH)):
        yield chunk
