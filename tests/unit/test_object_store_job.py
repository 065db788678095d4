"""Prompts from a bucket, and ``generate``'s companions on an output in one, by the command line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from job_helpers import all_ids, result_rows, start, write_prompts
from tide_ray.cli import app
from tide_ray.data.adoption import own_prefix
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.data.job_folder import JobFolder
from tide_ray.data.lock import locked
from tide_ray.data.manifest import part_files
from tide_ray.data.object_path import ObjectPath
from tide_ray.data.parts import write_part
from tide_ray.data.reports import Reporter
from tide_ray.data.snapshot import read_rows, write_snapshot
from tide_ray.data.storage import storage_path
from tide_ray.data.verify import verify_job


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def object_path(url: str) -> ObjectPath:
    path = storage_path(url, "output")
    assert isinstance(path, ObjectPath)
    return path


def read_prompts(tmp_path: Path, *prompts: str) -> list[str]:
    folder = tmp_path / "snapshot"
    write_snapshot(GenerateJobConfig.build({"prompts": list(prompts)}), folder)
    return [prompt for table in read_rows(folder) for prompt in table["prompt"].to_pylist()]


@pytest.fixture
def inputs(bucket: str) -> str:
    """A folder with a prompt in each kind of file, one of them deeper down, and a file that is no input."""
    folder = object_path(f"{bucket}/in")
    (folder / "1.jsonl").write_text('{"prompt": "one"}\n')
    (folder / "2.jsonl.gz").put(gzip.compress(b'{"prompt": "two"}\n'))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": ["three"], "other": [3]}), sink)
    (folder / "3.parquet").put(sink.getvalue().to_pybytes())
    (folder / "4.csv").write_text("id,prompt\n1,four\n")
    (folder / "deep" / "5.txt").write_text("five\n")
    (folder / "_notes" / "6.txt").write_text("not an input\n")
    (folder / "README.md").write_text("nor this")
    return str(folder)


def test_prompts_come_from_a_key_a_prefix_or_a_pattern(inputs: str, tmp_path: Path) -> None:
    assert read_prompts(tmp_path, inputs + "/") == ["one", "two", "three", "four", "five"]
    assert read_prompts(tmp_path / "a", f"{inputs}/2.jsonl.gz") == ["two"]
    assert read_prompts(tmp_path / "b", f"{inputs}/[13].*") == ["one", "three"]
    assert read_prompts(tmp_path / "c", f"{inputs}/**/*.txt", f"{inputs}/4.csv") == ["not an input", "five", "four"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "BUCKET/in/absent.jsonl"], "prompts: file not found: 'BUCKET/in/absent.jsonl'"),
        (["--prompts", "BUCKET/in/*.absent"], "prompts: no file matches 'BUCKET/in/*.absent'"),
        (["--prompts", "BUCKET-absent/x.jsonl"], "prompts: cannot read 'BUCKET-absent/x.jsonl': no such bucket"),
        (["--prompts", "BUCKET/in/README.md"], "prompts: 'BUCKET/in/README.md' is none of .jsonl"),
        (["--output", "BUCKET-absent/out"], "output: cannot write 'BUCKET-absent/out': no such bucket"),
        (["--output", "BUCKET/in"], "output: 'BUCKET/in' holds other files (1.jsonl) and no job"),
        (["--output", "s3://"], "output must be a path or s3://BUCKET/KEY, gs://BUCKET/KEY, az://BUCKET/KEY"),
    ],
)
def test_what_is_wrong_with_a_url_is_one_line(inputs: str, flags: list[str], message: str) -> None:
    bucket = inputs.removesuffix("/in")
    output = [] if "--output" in flags else ["--output", f"{bucket}/out"]
    result = invoke("generate", *(flag.replace("BUCKET", bucket, 1) for flag in flags), *output)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert message.replace("BUCKET", bucket) in line or message in line


@pytest.fixture
def job(bucket: str, tmp_path: Path) -> JobFolder:
    """A finished job in two parts, of three and two rows, and one of errors."""
    folder, snapshot = start(object_path(f"{bucket}/out"), write_prompts(tmp_path / "prompts.jsonl"))
    ids, facts = all_ids(folder), folder.fields()
    folder.write_bad_rows(folder.committed(), facts)
    for number, part in enumerate((ids[:3], ids[3:5])):
        name = f"{own_prefix(folder.attempt)}{number:06d}.parquet"
        write_part(folder.scratch, folder.path / "data" / name, [result_rows(part)], facts)
    folder.finish({"device": "cpu"}, folder.check_complete(snapshot, folder.committed()))
    folder.clear_uncommitted()
    return folder


def test_a_finished_job_is_verified_merged_and_read(job: JobFolder) -> None:
    assert invoke("verify", job.path).stdout == "ok: 5 rows and 1 errors of 6 in 3 parts; finished\n"
    assert invoke("status", job.path).stdout == "finished: 6 of 6 rows (100%), 1 of them rejected, 0 left\n"
    assert json.loads((job.path / "run.json").read_text()) == {"device": "cpu"}
    assert {path.name for path in job.path.iterdir()} == {
        "_SUCCESS", "_attempt.json", "_input", "_job.json", "_manifest.json", "data", "errors", "run.json",
    }  # fmt: skip
    merged = invoke("compact", job.path)
    assert merged.stdout == "data: 2 parts before, 1 now\nerrors: 1 parts before, 1 now\n", merged.output
    assert invoke("verify", job.path).stdout == "ok: 5 rows and 1 errors of 6 in 2 parts; finished\n"
    assert not (job.path / "_compacted").is_dir()


def test_damage_is_found_and_named(job: JobFolder) -> None:
    first, second = part_files(job.path, "data")
    assert isinstance(first, ObjectPath)
    content = first.read_bytes()
    first.put(content[:-100])
    assert f"{first.name}: cannot be read" in "".join(verify_job(job.path).problems)
    first.put(content[:60] + bytes([content[60] ^ 1]) + content[61:])
    assert f"{first.name}: its rows are not those that were written" in "".join(verify_job(job.path).problems)
    first.put(content)
    assert verify_job(job.path).problems == []
    second.unlink()
    result = invoke("verify", job.path)
    assert result.exit_code == 1
    assert f"{second.name}: missing, it is in the manifest" in result.stdout
    assert "2 rows missing from a finished job" in result.stdout


def test_an_interrupted_job_says_where_it_stands_and_who_is_at_it(bucket: str, tmp_path: Path) -> None:
    folder, _ = start(object_path(f"{bucket}/out"), write_prompts(tmp_path / "prompts.jsonl"))
    name = f"{own_prefix(folder.attempt)}000000.parquet"
    write_part(folder.scratch, folder.path / "data" / name, [result_rows(all_ids(folder)[:2])], {})
    assert invoke("status", folder.path).stdout == "stopped: 2 of 6 rows (33%), 0 of them rejected, 4 left\n"
    with locked(folder.path, folder.attempt):
        reporter = Reporter(str(folder.scratch / "reports"), "a")
        reporter.engine_started({}, 1.0)
        reporter.rows_arrived(4)
        reporter.batch_done({"rows": 2, "errors": 0, "tokens": 4, "depths": 8}, {}, None, {})
        status = json.loads(invoke("status", folder.path, "--json").stdout)
        assert (status["state"], status["attempt"], status["engines"]) == ("running", folder.attempt, 1)
        assert "is owned by process" in invoke("compact", folder.path).stderr
    assert "is not finished" in invoke("compact", folder.path).stderr


@pytest.mark.parametrize("command", ["verify", "status", "compact"])
def test_a_place_without_a_job_is_refused_in_one_line(bucket: str, command: str) -> None:
    result = invoke(command, f"{bucket}/out")
    assert (result.exit_code, result.stderr) == (2, f"error: output: no job in '{bucket}/out'\n")
    result = invoke(command, f"{bucket}-absent/out")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
