"""``tide-ray query``: formats, files, streams and mistakes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from analytics_helpers import make_rows, write_output
from tide_ray.cli import app

QUERY = "SELECT row_id, exit_layers, mean_exit_layer, kind, finished_at FROM rows ORDER BY row_id"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_output(tmp_path_factory.mktemp("query") / "out", make_rows(20), kept=("kind",))


def query(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["query", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_table_is_for_people(out: Path) -> None:
    printed = query(out, "SELECT count(*) AS num_rows, avg(mean_exit_layer) AS depth FROM rows")
    rows = make_rows(20)
    assert "num_rows" in printed
    assert f"{sum(row['mean_exit_layer'] for row in rows) / 20:.6g}" in printed
    many = query(out, "SELECT * FROM range(2500)")
    assert "the first 1,000 rows" in many
    assert " 999 " in many
    assert " 1000 " not in many


def test_json_has_an_object_a_line_and_nothing_that_is_no_json(out: Path) -> None:
    found = [json.loads(line) for line in query(out, QUERY, "--format", "json").splitlines()]
    for row, expected in zip(found, make_rows(20), strict=True):
        assert row["exit_layers"] == expected["exit_layers"]
        assert row["kind"] == expected["kind"]
        assert row["finished_at"] == expected["finished_at"].isoformat()
    printed = query(out, "SELECT 'NaN'::DOUBLE AS a, [1.5, 'inf'::DOUBLE] AS b, sum(1) AS c, {'d': NULL} AS e",
                    "--format", "json")  # fmt: skip
    assert json.loads(printed) == {"a": None, "b": [1.5, None], "c": 1, "e": {"d": None}}


def test_csv_has_lists_as_json(out: Path) -> None:
    found = list(csv.DictReader(query(out, QUERY, "--format", "csv").splitlines()))
    assert [json.loads(row["exit_layers"]) for row in found] == [row["exit_layers"] for row in make_rows(20)]
    assert [row["kind"] for row in found] == [row["kind"] or "" for row in make_rows(20)]


def test_a_files_name_tells_its_format_and_millions_of_rows_are_streamed(out: Path, tmp_path: Path) -> None:
    query(out, QUERY, "--output", tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet")["exit_layers"].to_pylist() == [
        row["exit_layers"] for row in make_rows(20)
    ]
    many = "SELECT number, number % 7 AS rest FROM range(2000000) AS t(number)"
    query(out, many, "--output", tmp_path / "many.parquet")
    metadata = pq.read_metadata(tmp_path / "many.parquet")
    assert metadata.num_rows == 2_000_000
    assert metadata.num_row_groups > 10, "written as it was computed"
    query(out, many, "--output", tmp_path / "many.csv")
    with (tmp_path / "many.csv").open() as file:
        assert sum(1 for _ in file) == 2_000_001
    assert {path.name for path in tmp_path.iterdir()} == {"rows.parquet", "many.parquet", "many.csv"}


def test_whoever_has_enough_closes_the_pipe_without_an_error(out: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tide_ray.cli",
        "query",
        str(out),
        "SELECT * FROM range(3000000)",
        "--format",
        "csv",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline() == '"range"\n'
        running.stdout.close()
        assert running.stderr.read() == ""
        assert running.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{out}"], "error: query takes output folders and then a SELECT, got only"),
        (["{out}", "SELECT nothing FROM rows"], "error: sql: Binder Error"),
        (["{out}", "DROP VIEW rows"], "error: sql must be one SELECT, got 'DROP VIEW rows'"),
        (["{out}", "SELECT 1", "--format", "xml"], "error: format must be one of table, csv, json, parquet, got 'xml'"),
        (["{out}", "SELECT 1", "--format", "parquet"], "error: format: parquet needs --output FILE, got 'parquet'"),
        (["{out}", "SELECT 1", "--output", "{out}/no/such.csv"], "error: output: cannot write"),
        (["{out}", "SELECT 1", "--output", "~nobody-of-that-name/x.csv"], "error: output: no such home, got"),
        (["{out}/missing", "SELECT 1"], "error: output: no job in"),
        (["{out}", "SELECT 1", "--memory-limit", "lots"], "error: memory_limit must be"),
        (["{out}", "SELECT error('late') FROM rows", "--output", "{out}/late.csv"], "error: sql: Invalid Input Error"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str, out: Path) -> None:
    before = sorted(path.name for path in out.iterdir())
    done = CliRunner().invoke(app, ["query", *(argument.format(out=out) for argument in arguments)])
    assert done.exit_code == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in out.iterdir()) == before


@pytest.mark.parametrize("more", [[], ["--output", "late.csv"]])
def test_a_mistake_that_shows_after_many_rows_is_the_querys(
    more: list[str], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    late = "SELECT if(n = 2999999, error('too late'), n) AS n FROM range(3000000) AS t(n)"
    done = CliRunner().invoke(app, ["query", str(out), late, "--format", "csv", *more])
    assert done.exit_code == 2, done.exception
    assert done.stderr.startswith("error: sql: ")
    assert "too late" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_token_texts_that_cannot_be_had_are_noted(out: Path) -> None:
    done = CliRunner().invoke(app, ["query", str(out), "SELECT token FROM tokens LIMIT 1", "--format", "json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"token": None}
    assert done.stderr.startswith("note: token texts are NULL")
