"""Part files: schema, metadata, atomicity."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tide_ray.data.parts import output_table, write_part
from tide_ray.data.result_rows import RESULT_SCHEMA
from tide_ray.data.schema import ATTEMPTS_COLUMN, ERROR_COLUMN, ERROR_SCHEMA, KEPT_PREFIX, OUTPUT_SCHEMA
from tide_ray.data.sink import ParquetSink

FACTS = {"model": "tiny", "sampling": {"max_tokens": 3}, "revision": None}


def block(*errors: str, first: int = 0) -> pa.Table:
    """A block as the generator yields it, one row per error text."""
    rows = []
    for i, error in enumerate(errors, start=first):
        empty: dict[str, Any] = {item.name: None for item in RESULT_SCHEMA}
        generated = [] if error else [5, 6]
        rows.append(
            {
                **empty,
                "row_id": f"row-{i}",
                "prompt": f"prompt {i}",
                "generated_tokens": generated,
                "exit_layers": [2] * len(generated),
                "token_times_us": [70] * len(generated),
                "num_generated_tokens": len(generated),
                ERROR_COLUMN: error,
                ATTEMPTS_COLUMN: 2 * i,
                KEPT_PREFIX + "label": i,
            }
        )
    ours = [pa.field("row_id", pa.string()), pa.field(ATTEMPTS_COLUMN, pa.int32())]
    fields = [*ours, *RESULT_SCHEMA, pa.field(KEPT_PREFIX + "label", pa.int16())]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def sink(output: Path) -> ParquetSink:
    return ParquetSink(
        str(output),
        scratch=str(output / "_tmp"),
        attempt="a1",
        rows_per_part=4,
        facts=FACTS,
        late_facts=lambda: {"device": "cpu", "model": "late"},
    )


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "_tmp").mkdir()
    return tmp_path / "_tmp"


def task(index: int) -> Any:
    return SimpleNamespace(task_idx=index)


def test_rows_and_errors_go_to_their_folders_with_the_exact_schemas(tmp_path: Path) -> None:
    counts = sink(tmp_path).write([block("", "too long"), block(), block("", first=2)], task(3))
    assert counts == {"rows": 2, "errors": 1}
    data = pq.read_table(tmp_path / "data" / "part-a1-000003.parquet")
    assert data.schema.remove_metadata() == pa.schema([*OUTPUT_SCHEMA, pa.field("label", pa.int16())])
    assert data["row_id"].to_pylist() == ["row-0", "row-2"]
    errors = pq.read_table(tmp_path / "errors" / "part-a1-000003.parquet")
    assert errors.schema.remove_metadata() == ERROR_SCHEMA
    assert errors.to_pylist() == [
        {"row_id": "row-1", "stage": "generate", "error": "too long", "attempts": 3, "input": "prompt 1"}
    ]


def test_duckdb_and_polars_read_plain_lists(tmp_path: Path) -> None:
    sink(tmp_path).write([block("", "")], task(0))
    pattern = str(tmp_path / "data" / "*.parquet")
    query = f"select typeof(exit_layers), typeof(token_times_us), typeof(generated_tokens) from '{pattern}' limit 1"
    assert duckdb.sql(query).fetchall() == [("SMALLINT[]", "INTEGER[]", "INTEGER[]")]
    layers = duckdb.sql(
        f"select unnest(exit_layers) as depth, unnest(token_times_us) as us from '{pattern}'"
    ).fetchall()
    assert layers == [(2, 70)] * 4
    assert pl.read_parquet(pattern).schema["exit_layers"] == pl.List(pl.Int16)


def test_run_facts_are_in_the_metadata_of_every_part(tmp_path: Path) -> None:
    sink(tmp_path).write([block("", "bad")], task(0))
    for folder in ("data", "errors"):
        metadata = pq.read_schema(tmp_path / folder / "part-a1-000000.parquet").metadata
        assert metadata[b"tide_ray.model"] == b"late"
        assert metadata[b"tide_ray.device"] == b"cpu"
        assert metadata[b"tide_ray.sampling"] == b'{"max_tokens": 3}'
        assert metadata[b"tide_ray.schema_version"] == b"3"
        assert b"tide_ray.revision" not in metadata


def test_a_retried_task_replaces_its_own_part(tmp_path: Path) -> None:
    for _ in range(2):
        sink(tmp_path).write([block("")], task(0))
    sink(tmp_path).write([block("", first=1)], task(1))
    assert [path.name for path in sorted((tmp_path / "data").iterdir())] == [
        "part-a1-000000.parquet",
        "part-a1-000001.parquet",
    ]


def test_no_rows_make_no_files(tmp_path: Path) -> None:
    assert sink(tmp_path).write([block()], task(0)) == {"rows": 0, "errors": 0}
    assert list(tmp_path.iterdir()) == [tmp_path / "_tmp"]


def test_a_writer_that_outlived_its_job_commits_nothing(tmp_path: Path, scratch: Path) -> None:
    """The next attempt has removed the scratch folder, and has read what is committed."""
    scratch.rmdir()
    with pytest.raises(FileNotFoundError):
        sink(tmp_path).write([block("")], task(0))
    assert list((tmp_path / "data").iterdir()) == []
    assert not scratch.exists()


def test_a_full_disk_commits_nothing_and_leaves_nothing_behind(tmp_path: Path, scratch: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_part(scratch, tmp_path / "data" / "part.parquet", [output_table(block("", ""))], FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "data").iterdir()) == []
    assert list(scratch.iterdir()) == []


def test_a_part_is_never_visible_before_it_is_complete(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def replace(source: Path, target: Path) -> None:
        seen.append((pq.read_metadata(source).num_rows, target.exists()))
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="killed here"):
        write_part(scratch, tmp_path / "data" / "part.parquet", [output_table(block("", ""))], FACTS)
    assert seen == [(2, False)]
    assert list((tmp_path / "data").iterdir()) == []
    assert list(scratch.iterdir()) == []
