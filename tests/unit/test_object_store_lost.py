"""An object store that is gone, from the start or in the middle, is one line that says where and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner, Result

from analytics_helpers import make_rows, write_output
from job_helpers import finished_job, write_prompts
from object_store import S3Server, s3_server, upload
from tide_ray.analytics import load
from tide_ray.analytics.export import whole_file, write_csv
from tide_ray.cli import app
from tide_ray.data import object_client
from tide_ray.data.object_client import Bucket
from tide_ray.types import JobError

QUERY = "SELECT count(*) FROM rows"
COMMANDS = {
    "status": ("status", "OUT"),
    "verify": ("verify", "OUT"),
    "compact": ("compact", "OUT"),
    "query": ("query", "OUT", QUERY),
    "report": ("report", "OUT", "--output", "PAGE"),
}


def invoke(command: str, out: str, tmp_path: Path) -> Result:
    names = {"OUT": out, "PAGE": str(tmp_path / "page.html")}
    return CliRunner().invoke(app, [names.get(word, word) for word in COMMANDS[command]])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """One that a test may stop, and clients that try a second time, not for twenty seconds."""
    quick = {**object_client.RETRIES, "max_retries": 1, "retry_timeout": timedelta(seconds=5)}
    monkeypatch.setattr(object_client, "RETRIES", quick)
    forget_clients()
    with s3_server() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made
    forget_clients()


def forget_clients() -> None:
    """They keep the address that they were made with."""
    object_client.bucket.cache_clear()
    object_client.aws.cache_clear()


@pytest.fixture
def out(server: S3Server, tmp_path: Path) -> str:
    """A finished job, in a bucket."""
    folder = finished_job(tmp_path / "out", write_prompts(tmp_path / "prompts.jsonl"))
    url = f"{server.make_bucket()}/out"
    upload(Path(str(folder.path)), url)
    return url


@contextmanager
def stopping(server: S3Server, is_time: Callable[[str], bool]) -> Iterator[list[str]]:
    """Stop the server just before the first request that ``is_time``. Gives the keys that were asked for."""
    asked: list[str] = []
    errors = Bucket._errors

    def request(self: Bucket, key: str) -> Any:
        if is_time(key):
            server.stop()
        asked.append(key)
        return errors(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "_errors", request)
        yield asked


def test_a_store_that_is_gone_before_the_first_request(out: str, server: S3Server, tmp_path: Path) -> None:
    assert invoke("verify", out, tmp_path).exit_code == 0, "it was there"
    server.stop()
    for command in COMMANDS:
        done = invoke(command, out, tmp_path)
        assert done.exit_code == 2, done.output
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: output: cannot read '{out}': ")
        assert server.environment["AWS_ENDPOINT_URL"] in line
        assert done.stdout == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_store_that_goes_as_parts_are_read(command: str, out: str, server: S3Server, tmp_path: Path) -> None:
    with stopping(server, lambda key: key.startswith("out/data/")) as asked:
        done = invoke(command, out, tmp_path)
    assert len(asked) > 3, "it had begun"
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    # What compact fails with last is that it cannot give the output back.
    assert f"'{out}/{'_lock' if command == 'compact' else 'data/part-a.parquet'}': " in line
    assert server.environment["AWS_ENDPOINT_URL"] in line
    assert "problem" not in done.stdout
    assert not (tmp_path / "page.html").exists()


def test_a_store_that_goes_amid_a_query_of_many_batches(server: S3Server, tmp_path: Path) -> None:
    out = f"{server.make_bucket()}/out"
    rows = [{**row, "row_id": f"{part}-{row['row_id']}"} for part in range(30) for row in make_rows(1_000)]
    upload(write_output(tmp_path / "out", rows, rows_per_part=1_000), out)
    numbers = "SELECT row_id, position FROM tokens"
    with load(out, threads=1) as analytics:
        assert analytics.records(QUERY) == [{"count_star()": len(rows)}]
        seen = []

        def read(reader: pa.RecordBatchReader) -> None:
            for batch in reader:
                seen.append(batch.num_rows)
                server.stop()

        with analytics.batches(numbers) as reader, pytest.raises(JobError, match=f"output: cannot read '{out}/data/"):
            read(reader)
        assert seen
        with (
            pytest.raises(JobError, match=f"output: cannot read '{out}/data/"),
            analytics.batches(numbers) as reader,
            whole_file(str(tmp_path / "numbers.csv")) as stream,
        ):
            write_csv(reader, stream)
    assert not (tmp_path / "numbers.csv").exists()
