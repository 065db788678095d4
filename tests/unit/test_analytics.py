"""SQL views over the outputs of jobs: what they hold, and that queries can do nothing but read them."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analytics_helpers import expected_tokens, make_rows, write_output
from tide_ray.analytics import load
from tide_ray.analytics.vocabulary import token_class
from tide_ray.data.schema import OPTIONAL_SCHEMA, OUTPUT_SCHEMA
from tide_ray.types import UserError
from tiny_models import EOS_ID, tiny_tokenizer

ERROR = {"row_id": "bad", "stage": "generate", "error": "too long", "attempts": 1, "input": "x" * 9}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """Read only."""
    return write_output(
        tmp_path_factory.mktemp("analytics") / "out", make_rows(50), model=str(tiny_llama_folder), kept=("kind",),
        errors=[ERROR], run={"engine": {"num_layers": 4, "exits": {"boundaries": [2, 3]}}, "tokens_per_second": 12.5},
    )  # fmt: skip


def test_rows_are_the_files_rows_with_their_types_and_kept_columns(out: Path) -> None:
    with load(out) as analytics:
        table = analytics.arrow("SELECT * FROM rows ORDER BY row_id")
    assert table.column_names == ["run", *OUTPUT_SCHEMA.names, *OPTIONAL_SCHEMA.names, "kind"]
    found, wanted = table.to_pylist(), make_rows(50)
    for row, expected in zip(found, wanted, strict=True):
        assert row["run"] == "out"
        assert {name: row[name] for name in expected if name != "mean_exit_layer"} == {
            name: value for name, value in expected.items() if name != "mean_exit_layer"
        }
        assert row["mean_exit_layer"] == pytest.approx(expected["mean_exit_layer"])
        assert all(row[name] is None for name in OPTIONAL_SCHEMA.names)


def test_tokens_are_unnested_with_position_text_class_depth_and_time(out: Path) -> None:
    with load(out) as analytics:
        tokens = analytics.records("SELECT * FROM tokens ORDER BY row_id, position")
        assert analytics.notes == []
    names = ("row_id", "position", "token_id", "depth", "time_us")
    assert [tuple(token[name] for name in names) for token in tokens] == expected_tokens(make_rows(50))
    tokenizer = tiny_tokenizer()
    for token in tokens:
        text = tokenizer.decode([token["token_id"]])
        assert token["token"] == text
        is_special = token["token_id"] in tokenizer.all_special_ids
        assert token["token_class"] == ("special" if is_special else token_class(text))
    assert any(token["token_id"] == EOS_ID for token in tokens)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" ", "whitespace"), ("\n\n", "whitespace"), ("42", "digits"), (" 7", "digits"), (".", "punctuation"),
        (" +", "punctuation"), (" the", "word start"), ("ing", "word piece"), ("a1", "word piece"),
        ("\u00e9", "word piece"), ("\ufffd", "word piece"), (" \u65e5", "word start"), ("\u20ac", "punctuation"),
    ],
)  # fmt: skip
def test_every_token_has_one_class(text: str, kind: str) -> None:
    assert token_class(text) == kind


def test_errors_and_run_are_views_too(out: Path) -> None:
    with load(out) as analytics:
        assert analytics.records("SELECT * EXCLUDE run FROM errors") == [ERROR]
        (run,) = analytics.records("SELECT * FROM run")
        assert analytics.records("SELECT facts->>'$.engine.num_layers' AS n FROM run") == [{"n": "4"}]
    assert (run["run"], run["num_layers"], run["boundaries"], run["tokens_per_second"]) == ("out", 4, [2, 3], 12.5)
    assert run["is_finished"]


def test_older_files_read_forward_beside_newer_ones(tmp_path: Path) -> None:
    old_error = {name: value for name, value in ERROR.items() if name != "attempts"}
    old = write_output(tmp_path / "old", make_rows(5), version="1", errors=[old_error])
    new = write_output(tmp_path / "new", make_rows(5, seed=1), kept=("kind",), errors=[ERROR])
    assert "finished_at" not in pq.read_schema(next((old / "data").iterdir())).names
    with load([old, new]) as analytics:
        dated = analytics.records("SELECT run, count(*) AS n, count(finished_at) AS dated, count(prompt) AS prompts "
                                  "FROM rows GROUP BY run ORDER BY run")  # fmt: skip
        attempts = analytics.records("SELECT run, attempts FROM errors ORDER BY run")
        kinds = {row["kind"] for row in analytics.records("SELECT kind FROM rows WHERE run = 'old'")}
    assert dated == [
        {"run": "new", "n": 5, "dated": 5, "prompts": 5},
        {"run": "old", "n": 5, "dated": 0, "prompts": 5},
    ]
    assert attempts == [{"run": "new", "attempts": 1}, {"run": "old", "attempts": None}]
    assert kinds == {None}
    with load(old) as alone:
        assert alone.records("SELECT count(finished_at) AS n, count(shadow_loss) AS m FROM rows") == [{"n": 0, "m": 0}]


def test_globs_and_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_output(tmp_path / place / "out", make_rows(3))
        write_output(tmp_path / place / "other", make_rows(2))
    (tmp_path / "a" / "no-job").mkdir()
    with load(f"{tmp_path}/*/out") as analytics:
        assert analytics.records("SELECT run, count(*) AS n FROM rows GROUP BY run ORDER BY run") == [
            {"run": str(tmp_path / place / "out"), "n": 3} for place in ("a", "b")
        ]
    with load([f"{tmp_path}/a/*", tmp_path / "a" / "out"]) as analytics:
        assert [output.name for output in analytics.outputs] == ["other", "out"], "each once"


def test_a_path_with_the_characters_of_a_glob_is_itself(tmp_path: Path) -> None:
    write_output(tmp_path / "o[1]t'*", make_rows(3))
    with load(tmp_path / "o[1]t'*") as analytics:
        assert analytics.records("SELECT count(*) AS n FROM tokens")[0]["n"] == len(expected_tokens(make_rows(3)))


def test_a_job_without_rows_yet_has_empty_views(tmp_path: Path) -> None:
    with load(write_output(tmp_path / "out", [])) as analytics:
        for view in ("rows", "tokens", "errors"):
            assert analytics.records(f"SELECT count(*) AS n FROM {view}") == [{"n": 0}]
        assert analytics.records("SELECT is_finished FROM run") == [{"is_finished": False}]


def test_without_its_tokenizer_texts_are_null_and_the_reason_is_noted(tmp_path: Path) -> None:
    with load(write_output(tmp_path / "out", make_rows(4), model=str(tmp_path / "gone"))) as analytics:
        assert analytics.records("SELECT sum(num_generated_tokens) AS tokens FROM rows")
        assert analytics.notes == [], "no query has asked for texts"
        (row,) = analytics.records("SELECT count(*) AS n, count(token) AS t, count(token_class) AS c FROM tokens")
        assert row == {"n": len(expected_tokens(make_rows(4))), "t": 0, "c": 0}
        (note,) = analytics.notes
    assert note.startswith("token texts are NULL: model: no such folder or file")


def test_runs_of_two_models_each_have_their_own_texts(tmp_path: Path, out: Path, tiny_llama_folder: Path) -> None:
    write_output(tmp_path / "no-texts", make_rows(3), model=str(tmp_path / "gone"))
    with load([out, tmp_path / "no-texts"]) as analytics:
        counts = analytics.records(
            "SELECT run, count(token) = count(*) AS has_texts FROM tokens GROUP BY run ORDER BY run"
        )
    assert counts == [{"run": "no-texts", "has_texts": False}, {"run": "out", "has_texts": True}]


def test_what_is_no_output_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output: no job in"):
        load(tmp_path)
    with pytest.raises(UserError, match="no folder of a job matches"):
        load(f"{tmp_path}/x*")
    with pytest.raises(UserError, match="memory_limit must be a number and a unit like 2GB, got 'much'"):
        load(tmp_path, memory_limit="much")
    with pytest.raises(UserError, match="threads must be at least 1, got 0"):
        load(tmp_path, threads=0)
    broken = write_output(tmp_path / "out", make_rows(3))
    next((broken / "data").iterdir()).write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match="is damaged"):
        load(broken)
    (broken / "_compacted.json").write_text("{}")
    with pytest.raises(UserError, match="compact was interrupted"):
        load(broken)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM read_parquet('{other}')",
        "SELECT * FROM glob('{folder}/*')",
        "COPY (SELECT 1) TO '{folder}/made.csv'",
        "COPY (SELECT 1 AS a) TO '{part}' (FORMAT parquet)",
        "ATTACH '{folder}/made.db'",
        "EXPORT DATABASE '{folder}/made'",
        "SET enable_external_access = true",
        "SET memory_limit = '100GB'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY (SELECT 1) TO '{folder}/made.csv'",
        "CREATE TABLE made (a INTEGER)",
        "WITH w AS (COPY (SELECT 1 AS a) TO '{part}' (FORMAT parquet, USE_TMP_FILE false)) SELECT * FROM w",
        "WITH w AS (INSERT INTO _vocabulary_0 VALUES (1, 'a', 'b') RETURNING *) SELECT * FROM w",
        "SELECT 1) TO '{folder}/made.csv'; --",
        "SELECT * FROM rows) SELECT * FROM (SELECT 1",
        "DROP VIEW rows",
        "PRAGMA database_list",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{folder}/made.csv'",
        "SELECT * FROM folder_of_the_test",
        "SELECT * FROM nothing",
        "SELECT nothing FROM rows",
        "SELEC 1",
        "",
        "SELECT error('on purpose') FROM rows",
    ],
)
def test_a_query_can_only_read_the_views(query: str, tmp_path: Path) -> None:
    folder_of_the_test = pq.read_table(write_output(tmp_path / "other", make_rows(1)) / "data")
    assert folder_of_the_test.num_rows == 1
    out = write_output(tmp_path / "out", make_rows(3))
    secret, part = tmp_path / "secret.csv", next((out / "data").iterdir())
    secret.write_text("key\n123\n")
    other = next((tmp_path / "other" / "data").iterdir())
    before, names = part.read_bytes(), sorted(os.listdir(tmp_path))
    with load(out, spill_folder=tmp_path) as analytics:
        with pytest.raises(UserError, match=r"^sql") as raised:
            analytics.arrow(query.format(secret=secret, folder=tmp_path, part=part, other=other))
        assert "\n" not in str(raised.value)
        assert analytics.records("SELECT count(*) AS n FROM rows") == [{"n": 3}], "and it still answers"
    assert part.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize(
    "query",
    ["SELECT 1 AS a", "SELECT 1 AS a;", " SELECT 1 AS a -- b;", "FROM (VALUES (1)) t(a)"],
)
def test_semicolons_and_comments_may_end_a_query(query: str, tmp_path: Path) -> None:
    with load(write_output(tmp_path / "out", make_rows(1))) as analytics:
        assert analytics.records(query) == [{"a": 1}]
        assert analytics.records("SELECT row_id FROM (SELECT unnest(range(9)) AS row_id) ORDER BY row_id DESC") == [
            {"row_id": number} for number in range(8, -1, -1)
        ]
        assert analytics.records("DESCRIBE run")[0]["column_name"] == "run"


def test_what_does_not_fit_is_spilled_and_removed_at_the_end(tmp_path: Path) -> None:
    out, spill = write_output(tmp_path / "out", make_rows(3)), tmp_path / "spill"
    spill.mkdir()
    query = "SELECT number, md5(number::VARCHAR) AS text FROM range(3000000) AS t(number) ORDER BY text"
    with load(out, memory_limit="100MB", threads=1, spill_folder=spill) as analytics:
        with analytics.batches(query) as reader:
            first = next(iter(reader))
            (folder,) = spill.iterdir()
            assert any(folder.iterdir()), "3 million rows of 48 bytes are more than 100 MB"
            num_rows = first.num_rows + sum(batch.num_rows for batch in reader)
        assert num_rows == 3_000_000
    assert list(spill.iterdir()) == []
    with pytest.raises(UserError, match="spill_folder: cannot write"):
        load(out, spill_folder=tmp_path / "missing")
