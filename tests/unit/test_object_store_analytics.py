"""``query``, ``report`` and ``load`` on outputs in a bucket: as on the same outputs in a folder, and nothing more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pyarrow.parquet import read_metadata
from typer.testing import CliRunner, Result

from analytics_helpers import make_rows, num_tokens, run_facts, write_output
from object_store import upload
from tide_ray.analytics import load
from tide_ray.cli import app
from tide_ray.data import object_client
from tide_ray.data.adoption import adopt_parts
from tide_ray.data.object_client import Bucket
from tide_ray.data.object_path import ObjectPath
from tide_ray.data.reading import damage_named, for_arrow
from tide_ray.types import UserError

ROWS = make_rows(60)
ERROR = {"row_id": "bad", "stage": "generate", "error": "too long", "attempts": 1, "input": "x" * 9}
VIEWS = {
    "rows": "SELECT * FROM rows ORDER BY row_id",
    "tokens": "SELECT * FROM tokens ORDER BY row_id, position",
    "errors": "SELECT * FROM errors",
    "run": "SELECT * EXCLUDE path FROM run",
}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """Read only."""
    return write_output(
        tmp_path_factory.mktemp("analytics") / "out", ROWS, model=str(tiny_llama_folder), kept=("kind",),
        errors=[ERROR], run=run_facts(num_tokens(ROWS)),
    )  # fmt: skip


@pytest.fixture
def out(bucket: str, local: Path) -> str:
    """The same in a bucket."""
    upload(local, f"{bucket}/runs/out")
    return f"{bucket}/runs/out"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_view_has_the_rows_of_the_local_copy(local: Path, out: str) -> None:
    with load(local) as here, load(out) as there:
        for query in VIEWS.values():
            wanted = here.arrow(query)
            assert wanted.num_rows
            assert there.arrow(query) == wanted
        with there.batches(VIEWS["tokens"]) as reader:
            assert reader.read_all() == here.arrow(VIEWS["tokens"])
        assert there.pandas("SELECT count(*) AS n FROM rows")["n"].tolist() == [len(ROWS)]
        assert there.records("SELECT path FROM run") == [{"path": out}]


def test_query_prints_and_report_renders_what_they_do_of_the_local_copy(local: Path, out: str, tmp_path: Path) -> None:
    for query in VIEWS.values():
        printed = [invoke("query", place, query, "--format", "json") for place in (local, out)]
        assert [one.exit_code for one in printed] == [0, 0], printed[1].stderr
        assert printed[0].stdout == printed[1].stdout != ""
    pages = []
    for number, place in enumerate((local, out)):
        done = invoke("report", place, "--output", tmp_path / f"{number}.html")
        assert done.exit_code == 0, done.stderr
        pages.append((tmp_path / f"{number}.html").read_text().replace(str(place), "PLACE"))
    assert pages[0] == pages[1]
    assert "answer" in pages[0]


def test_globs_name_folders_in_a_bucket_and_outputs_here_and_there_compare(
    bucket: str, out: str, local: Path, tmp_path: Path
) -> None:
    upload(local, f"{bucket}/runs/other")
    upload(local, f"{bucket}/more/out")
    upload(local / "data", f"{bucket}/runs/no-job/files")
    with load([f"{bucket}/runs/*", out]) as analytics:
        assert [output.name for output in analytics.outputs] == ["other", "out"], "each once"
    with load(f"{bucket}/*/out") as analytics:
        counts = analytics.records("SELECT run, count(*) AS n FROM rows GROUP BY run ORDER BY run")
    assert counts == [{"run": f"{bucket}/{place}/out", "n": len(ROWS)} for place in ("more", "runs")]
    done = invoke("report", local, out, "--output", tmp_path / "page.html")
    assert "60 prompts are in both runs, 0 only in the first" in done.stdout, done.stderr


def test_a_file_that_is_gone_is_not_called_damaged(out: str) -> None:
    (path,) = (ObjectPath.parse(out) / "errors").iterdir()
    path.unlink()
    with pytest.raises(UserError, match=f"output: cannot read '{path}': no such bucket or object"), damage_named(path):
        read_metadata(for_arrow(path))


def test_a_key_with_the_characters_of_a_glob_is_itself(bucket: str, local: Path) -> None:
    place = f"{bucket}/o[1]t'*"
    upload(local, place)
    with load(place) as analytics:
        assert analytics.records("SELECT count(*) AS n FROM rows") == [{"n": len(ROWS)}]


def test_a_part_that_came_after_its_attempt_was_over_is_not_read(out: str, local: Path) -> None:
    folder = ObjectPath.parse(out)
    names = sorted(f"data/{path.name}" for path in (local / "data").iterdir())
    adopt_parts(folder, "attempt", ("data", "errors"), lambda: names[1:])
    with load(out) as analytics:
        assert analytics.records("SELECT min(row_id) AS id FROM rows") == [{"id": ROWS[16]["row_id"]}]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_parquet('{bucket}/secret.parquet')",
        "SELECT * FROM read_parquet('{bucket}/runs/out/data/*.parquet')",
        "SELECT * FROM read_text('{bucket}/secret.parquet')",
        "SELECT * FROM glob('{bucket}/*')",
        "SELECT * FROM read_csv('/etc/hostname')",
        "COPY (SELECT 1) TO '{bucket}/made.csv'",
        "WITH w AS (COPY (SELECT 1 AS a) TO '{part}' (FORMAT parquet)) SELECT * FROM w",
        "LOAD httpfs",
    ],
)
def test_a_query_can_only_read_the_views(query: str, bucket: str, out: str) -> None:
    secret = ObjectPath.parse(f"{bucket}/secret.parquet")
    first = min((ObjectPath.parse(out) / "data").iterdir())
    secret.put(first.read_bytes())
    before = {str(path): path.stat() for path in ObjectPath.parse(bucket).rglob("*")}
    with load(out) as analytics:
        with pytest.raises(UserError, match=r"^sql") as raised:
            analytics.arrow(query.format(bucket=bucket, part=first))
        assert "\n" not in str(raised.value)
        assert analytics.records("SELECT count(*) AS n FROM rows") == [{"n": len(ROWS)}], "and it still answers"
    assert {str(path): path.stat() for path in ObjectPath.parse(bucket).rglob("*")} == before


def test_only_the_columns_that_a_query_asks_for_are_fetched(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "prompt": os.urandom(50_000).hex()} for row in ROWS]
    upload(write_output(tmp_path / "out", rows, rows_per_part=60), f"{bucket}/out")
    fetched = []
    get_range = Bucket.get_range
    monkeypatch.setattr(Bucket, "get_range", lambda self, *at: fetched.append(at[2] - at[1]) or get_range(self, *at))
    with load(f"{bucket}/out") as analytics:
        analytics.records("SELECT avg(mean_exit_layer) FROM rows")
        assert sum(fetched) < 500_000, "of 3 MB"
        analytics.records("SELECT max(prompt) FROM rows")
        assert sum(fetched) > 3_000_000


@pytest.mark.parametrize("command", ["query", "report"])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("PLACE/absent", "output: no job in 'PLACE/absent'"),
        ("PLACE/absent-*", "output: no folder of a job matches 'PLACE/absent-*'"),
        ("PLACE/runs", "output: no job in 'PLACE/runs'"),
        ("PLACE-absent/out", "output: cannot read 'PLACE-absent/out': no such bucket or object"),
        ("PLACE-absent/*", "output: cannot read 'PLACE-absent/*': no such bucket or object"),
        ("s3://", "output must be a path or s3://BUCKET/KEY, gs://BUCKET/KEY, az://BUCKET/KEY, got 's3://'"),
        ("PLACE/damaged", "output: 'PLACE/damaged/data/part-0000.parquet' is damaged: Parquet magic bytes not found"),
        ("PLACE/pending", "output: compact was interrupted in 'PLACE/pending': run it again"),
    ],
)
def test_what_is_wrong_with_a_url_is_one_line(
    command: str, place: str, message: str, bucket: str, out: str, local: Path, tmp_path: Path
) -> None:
    upload(local, f"{bucket}/damaged")
    (ObjectPath.parse(f"{bucket}/damaged") / "data/part-0000.parquet").put(b"PAR1 no parquet")
    upload(local, f"{bucket}/pending")
    (ObjectPath.parse(f"{bucket}/pending") / "_compacted.json").put(b"{}")
    more = ["SELECT 1"] if command == "query" else ["--output", tmp_path / "page.html"]
    done = invoke(command, place.replace("PLACE", bucket), *more)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message.replace('PLACE', bucket)}")


def test_without_credentials_the_reason_is_one_line(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    object_client.bucket.cache_clear()
    object_client.aws.cache_clear()
    try:
        done = invoke("query", out, "SELECT 1")
    finally:
        object_client.bucket.cache_clear()
        object_client.aws.cache_clear()
    assert done.exit_code == 2
    reason = "no AWS credentials (variables, profile or role) were found"
    assert done.stderr == f"error: output: cannot read '{out}': {reason}\n"
