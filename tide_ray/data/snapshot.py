"""The input snapshot: any source, normalised to Parquet with a stable ``row_id``, in bounded memory.

``_input/part-*.parquet`` holds every row of the job, bad ones included, and ``_input/snapshot.json`` what they are.
Ray reads only these files, so a job resumes from what it saw first, wherever the prompts came from.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.data.locate import open_sources
from tide_ray.data.prompts import PARAMS_COLUMN, PROMPT_COLUMNS, PromptRow, RowMaker, prompt_columns
from tide_ray.data.reading import fetched
from tide_ray.data.schema import KEPT_PREFIX, OUTPUT_SCHEMA, optional_columns
from tide_ray.data.sources import Source, conform
from tide_ray.data.storage import StoragePath, files_in, make_folder, writing
from tide_ray.messages import one_line
from tide_ray.types import UserError

ROWS_PER_FILE = 16_384
SNAPSHOT_FILE = "snapshot.json"
LENGTH_COLUMN = "expected_tokens"

INPUT_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("row_index", pa.int64()),
        ("content_hash", pa.string()),
        ("prompt", pa.string()),
        ("messages", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        (PARAMS_COLUMN, pa.string()),
        (LENGTH_COLUMN, pa.int32()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A written snapshot: row counts, a hash over ids and contents in order, and where the rows came from."""

    num_rows: int
    num_bad_rows: int
    sha256: str
    sources: list[str]

    @classmethod
    def load(cls, folder: StoragePath) -> Snapshot:
        return cls(**json.loads((folder / SNAPSHOT_FILE).read_text(encoding="utf-8")))


def write_snapshot(config: GenerateJobConfig, folder: StoragePath) -> Snapshot:
    """Read ``config.prompts`` and write the snapshot into the new folder ``folder``.

    Raises:
        UserError: a source, column or id that cannot be used, or no rows at all.
    """
    texts = ["prompt", "messages", "prompt_token_ids", PARAMS_COLUMN, config.prompt_column, config.id_column]
    sources = open_sources(config.prompts, [name for name in texts if name])
    plans = [(source, prompt_columns(source, config.prompt_column)) for source in sources]
    _check_column(sources, "id_column", config.id_column)
    _check_column(sources, "length_column", config.length_column)
    kept = _kept_schema(plans, config)
    make_folder(folder)
    maker = RowMaker(config.sampling_params(), config.id_column, config.length_column)
    num_rows = num_bad = 0
    with _PartWriter(folder, kept) as writer:
        for rows, table in _normalised(plans, maker, config, kept):
            num_bad += sum(bool(row.error) for row in rows)
            writer.write(rows, table, first_index=num_rows)
            num_rows += len(rows)
    if num_rows == 0:
        raise UserError(f"prompts: no rows in {', '.join(source.name for source in sources)}")
    snapshot = Snapshot(num_rows, num_bad, maker.digest.hexdigest(), [source.name for source in sources])
    (folder / SNAPSHOT_FILE).write_text(json.dumps(asdict(snapshot), indent=2) + "\n", encoding="utf-8")
    return snapshot


def snapshot_files(folder: StoragePath) -> list[StoragePath]:
    return files_in(folder, "part-*.parquet")


def read_rows(folder: StoragePath, without: Collection[str] = frozenset()) -> Iterator[pa.Table]:
    """The snapshot's rows in order, a table at a time, less those whose id is in ``without``."""
    for path in snapshot_files(folder):
        with fetched(path) as local, pq.ParquetFile(local) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_FILE):
                table = pa.Table.from_batches([batch])
                if without:
                    table = table.filter(pa.array([row_id not in without for row_id in table["row_id"].to_pylist()]))
                if table.num_rows:
                    yield table


def longest_first(rows: pa.Table) -> pa.Table:
    """A snapshot's rows in another order: expected answers that are longer come first, unknown ones before all.

    A sequence takes a step for each of its tokens however few run beside it, so that a long one that starts last ends
    alone; and a batch, which is over when its slowest row is, holds rows of like lengths.
    """
    lengths = rows[LENGTH_COLUMN].combine_chunks()
    return rows.take(pc.array_sort_indices(lengths, order="descending", null_placement="at_start"))


def _normalised(
    plans: list[tuple[Source, tuple[str, ...]]], maker: RowMaker, config: GenerateJobConfig, kept: pa.Schema
) -> Iterator[tuple[list[PromptRow], pa.Table]]:
    left = config.limit
    for source, columns in plans:
        named = (config.id_column, config.length_column)
        wanted = [*columns, PARAMS_COLUMN, *(name for name in named if name is not None)]
        for batch in source.batches(wanted, kept):
            rows = batch.rows if left is None else batch.rows[:left]
            yield [maker.make(row, columns) for row in rows], batch.kept.slice(0, len(rows))
            if left is not None:
                left -= len(rows)
                if left == 0:
                    return


def _check_column(sources: list[Source], setting: str, name: str | None) -> None:
    for source in sources:
        columns = source.columns
        if name is not None and columns and name not in columns:
            raise UserError(f"{setting}: {source.name!r} has no column {name!r}; columns: {', '.join(columns)}")


def _kept_schema(plans: list[tuple[Source, tuple[str, ...]]], config: GenerateJobConfig) -> pa.Schema:
    """Arrow types of the columns to keep, under their own names."""
    if not config.keep_columns:
        return pa.schema([])
    schemas = []
    for source, columns in plans:
        if config.keep_columns == "all":
            used = {*columns, *PROMPT_COLUMNS, PARAMS_COLUMN, config.id_column}
            schemas.append(pa.schema([item for item in source.schema(None) if item.name not in used]))
            continue
        schema = source.schema(config.keep_columns)
        for name in config.keep_columns:
            if name not in schema.names:
                listing = ", ".join(source.columns)
                raise UserError(f"keep_columns: {source.name!r} has no column {name!r}; columns: {listing}")
        schemas.append(schema)
    try:
        merged = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"keep_columns: the sources differ: {one_line(error)}") from None
    for name in merged.names:
        if name in OUTPUT_SCHEMA.names or name in optional_columns(config):
            raise UserError(f"keep_columns: {name!r} is a column of the output; rename it in the input")
    return merged


class _PartWriter:
    """Writes part files of ROWS_PER_FILE rows or a little more."""

    def __init__(self, folder: StoragePath, kept: pa.Schema) -> None:
        self._folder = folder
        self._schema = pa.schema([*INPUT_SCHEMA, *(item.with_name(KEPT_PREFIX + item.name) for item in kept)])
        self._kept = kept
        self._part: ExitStack | None = None
        self._num_parts = 0
        self._rows_in_part = 0

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._part is not None:
            self._part.__exit__(*failure)

    def write(self, rows: list[PromptRow], kept: pa.Table, *, first_index: int) -> None:
        own = {name: [getattr(row, name) for row in rows] for name in INPUT_SCHEMA.names if name != "row_index"}
        own["row_index"] = list(range(first_index, first_index + len(rows)))
        arrays = [pa.array(own[item.name], item.type) for item in INPUT_SCHEMA]
        arrays += conform(kept, self._kept).columns
        if self._part is None:
            self._part = ExitStack()
            stream = self._part.enter_context(writing(self._folder / f"part-{self._num_parts:05d}.parquet"))
            self._writer = self._part.enter_context(pq.ParquetWriter(stream, self._schema, compression="zstd"))
            self._num_parts += 1
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows_in_part += len(rows)
        if self._rows_in_part >= ROWS_PER_FILE:
            self._part.close()
            self._part = None
            self._rows_in_part = 0
