"""``tide-ray verify`` and ``status``: what is wrong with an output folder is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from job_helpers import all_ids, finished_job, result_rows, start, write_prompts
from tide_ray.cli import app
from tide_ray.data.job_folder import JobFolder
from tide_ray.data.lock import locked
from tide_ray.data.parts import write_part
from tide_ray.data.reports import Reporter
from tide_ray.data.verify import verify_job


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    return finished_job(tmp_path / "out", write_prompts(tmp_path / "prompts.jsonl"))


def part(job: JobFolder) -> Path:
    return job.path / "data" / "part-a.parquet"


def delete(job: JobFolder) -> None:
    part(job).unlink()


def truncate(job: JobFolder) -> None:
    part(job).write_bytes(part(job).read_bytes()[:-100])


def double(job: JobFolder) -> None:
    shutil.copy(part(job), part(job).with_name("part-copy.parquet"))


def edit_and_write_again(job: JobFolder) -> None:
    """With the schema's metadata, as programs do."""
    table = pq.read_table(part(job))
    index = table.schema.get_field_index("generated_text")
    texts = ["five", *table["generated_text"].to_pylist()[1:]]
    pq.write_table(table.set_column(index, table.schema.field(index), pa.array(texts)), part(job), compression="zstd")


def flip_a_bit(job: JobFolder) -> None:
    content = bytearray(part(job).read_bytes())
    content[60] ^= 1
    part(job).write_bytes(content)


def write_without_checksum(job: JobFolder) -> None:
    pq.write_table(result_rows(pq.read_table(part(job))["row_id"].to_pylist()), part(job))


def replace_by_another_part(job: JobFolder) -> None:
    """As large and as intact, with other rows."""
    ids = pq.read_table(part(job))["row_id"].to_pylist()
    job.begin()
    write_part(job.scratch, part(job), [result_rows([ids[0], ids[1], "0" * len(ids[2])])], job.fields())
    job.clear_uncommitted()


def write_other_columns(job: JobFolder) -> None:
    job.begin()
    table = result_rows(pq.read_table(part(job))["row_id"].to_pylist()).drop_columns(["prompt"])
    write_part(job.scratch, part(job), [table], job.fields())
    job.clear_uncommitted()


def drop_the_errors(job: JobFolder) -> None:
    shutil.rmtree(job.path / "errors")


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (delete, ["data/part-a.parquet: missing, it is in the manifest", "3 rows missing from a finished job"]),
        (truncate, ["data/part-a.parquet: cannot be read"]),
        (double, ["part-copy.parquet: not in the manifest", "3 rows are also in data/part-a.parquet"]),
        (edit_and_write_again, ["data/part-a.parquet: not written by a job, it has no checksum"]),
        (flip_a_bit, ["data/part-a.parquet: its rows are not those that were written"]),
        (write_without_checksum, ["data/part-a.parquet: not written by a job"]),
        (
            replace_by_another_part,
            ["not the file that the manifest lists", "1 rows are not in the input", "1 rows missing"],
        ),
        (write_other_columns, ["data/part-a.parquet: its schema is not the job's"]),
        (drop_the_errors, ["1 rows missing from a finished job", "_SUCCESS counts 5 rows and 1 errors"]),
    ],
)
def test_damage_is_found_and_named(job: JobFolder, damage: Callable[[JobFolder], None], messages: list[str]) -> None:
    assert verify_job(job.path).problems == []
    damage(job)
    problems = "\n".join(verify_job(job.path).problems)
    for message in messages:
        assert message in problems
    result = CliRunner().invoke(app, ["verify", str(job.path)])
    assert result.exit_code == 1
    assert "problem: " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("failed: ")


def test_a_finished_job_is_fine(job: JobFolder) -> None:
    result = CliRunner().invoke(app, ["verify", str(job.path)])
    assert result.exit_code == 0
    assert result.stdout == "ok: 5 rows and 1 errors of 6 in 3 parts; finished\n"
    found = json.loads(CliRunner().invoke(app, ["verify", "--json", str(job.path)]).stdout)
    assert (found["num_results"], found["num_errors"], found["problems"]) == (5, 1, [])


def test_rows_left_of_an_unfinished_job_are_no_problem(tmp_path: Path) -> None:
    folder, _ = start(tmp_path / "out", write_prompts(tmp_path / "prompts.jsonl"))
    write_part(
        folder.scratch, folder.path / "data" / "part-a.parquet", [result_rows(all_ids(folder)[:2])], folder.fields()
    )
    result = CliRunner().invoke(app, ["verify", str(folder.path)])
    assert result.exit_code == 0
    assert result.stdout == "ok: 2 rows and 0 errors of 6 in 1 parts; unfinished, 4 rows left\n"


def test_columns_from_the_names_of_folders_above_are_none_of_the_parts(tmp_path: Path) -> None:
    """Arrow's readers take ``model=x`` for a partition."""
    job = finished_job(tmp_path / "model=x" / "out", write_prompts(tmp_path / "prompts.jsonl"))
    assert verify_job(job.path).problems == []


@pytest.mark.parametrize("command", ["verify", "status", "compact"])
def test_a_folder_without_a_job_is_refused_in_one_line(tmp_path: Path, command: str) -> None:
    result = CliRunner().invoke(app, [command, str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr == f"error: output: no job in {str(tmp_path)!r}\n"


def test_status_tells_finished_stopped_and_running_jobs_apart(tmp_path: Path, job: JobFolder) -> None:
    def told(path: Path, *flags: str) -> str:
        result = CliRunner().invoke(app, ["status", str(path), *flags])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert told(job.path) == "finished: 6 of 6 rows (100%), 1 of them rejected, 0 left\n"
    folder, _ = start(tmp_path / "begun", write_prompts(tmp_path / "prompts.jsonl"))
    write_part(folder.scratch, folder.path / "data" / "part-a.parquet", [result_rows(all_ids(folder)[:2])], {})
    assert told(folder.path) == "stopped: 2 of 6 rows (33%), 0 of them rejected, 4 left\n"
    with locked(folder.path, folder.attempt):
        reporter = Reporter(str(folder.scratch / "reports"), "a")
        reporter.engine_started({}, 1.0)
        reporter.rows_arrived(4)
        reporter.batch_done({"rows": 2, "errors": 0, "tokens": 4, "depths": 8}, {}, None, {})
        status = json.loads(told(folder.path, "--json"))
        assert (status["state"], status["attempt"], status["left"], status["engines"]) == (
            "running", folder.attempt, 4, 1,
        )  # fmt: skip
        assert status["rows_per_second"] > 0
        assert "1 engines, " in told(folder.path)


def test_a_job_of_an_older_schema_version_is_whole_without_the_columns_that_came_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tide_ray.data.run_facts.SCHEMA_VERSION", "2")
    folder, snapshot = start(tmp_path / "out", write_prompts(tmp_path / "prompts.jsonl"))
    facts = folder.fields()
    folder.write_bad_rows(folder.committed(), facts)
    rows = result_rows(all_ids(folder)[:5])
    write_part(folder.scratch, part(folder), [rows.drop_columns(["finished_at"])], facts)
    folder.finish({}, folder.check_complete(snapshot, folder.committed()))
    assert verify_job(folder.path).problems == []
    job_file = folder.path / "_job.json"
    job_file.write_text(json.dumps({**facts, "schema_version": "3"}))
    assert verify_job(folder.path).problems == ["data/part-a.parquet: its schema is not the job's"]
