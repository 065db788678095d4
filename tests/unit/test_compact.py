"""``tide-ray compact``: the same rows in fewer files, wherever it is interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from job_helpers import finished_job, start, write_prompts
from tide_ray.cli import app
from tide_ray.data import compact
from tide_ray.data.compact_job import compact_job
from tide_ray.data.job_folder import JobFolder
from tide_ray.data.verify import verify_job
from tide_ray.types import JobError, UserError

LARGE = 1 << 30


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl")


@pytest.fixture
def job(tmp_path: Path, prompts: Path) -> JobFolder:
    return finished_job(tmp_path / "out", prompts)


def rows(job: JobFolder) -> list[dict[str, Any]]:
    parts = [pq.read_table(path) for path in sorted((job.path / "data").iterdir())]
    return sorted(pa.concat_tables(parts).to_pylist(), key=lambda row: row["row_id"])


def test_rows_schema_and_run_facts_stay_and_files_get_fewer(job: JobFolder) -> None:
    before = rows(job)
    schema = pq.read_schema(job.path / "data" / "part-a.parquet")
    result = CliRunner().invoke(app, ["compact", str(job.path)])
    assert result.exit_code == 0, result.output
    assert result.stdout == "data: 2 parts before, 1 now\nerrors: 1 parts before, 1 now\n"
    (path,) = (job.path / "data").iterdir()
    assert rows(job) == before
    after = pq.read_schema(path)
    assert after == schema
    assert after.metadata == schema.metadata
    assert verify_job(job.path).problems == []
    assert compact_job(job.path, file_bytes=LARGE) == {"data": (1, 1), "errors": (1, 1)}
    assert list((job.path / "data").iterdir()) == [path]


def test_files_stay_apart_where_they_would_be_too_large(job: JobFolder) -> None:
    assert compact_job(job.path, file_bytes=1) == {"data": (2, 2), "errors": (1, 1)}


@pytest.mark.parametrize("step", range(6))
def test_an_interrupted_compaction_loses_and_doubles_nothing(
    job: JobFolder, prompts: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A kill before the journal leaves the old files; from then on whoever owns the folder next finishes the job."""
    before = rows(job)
    num_calls = 0

    def dying(kind: str) -> Any:
        original = getattr(Path if kind == "unlink" else compact, kind)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls
            if args[0].suffix in (".parquet", ".json"):
                num_calls += 1
                if num_calls > step:
                    raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(compact, "commit_file", dying("commit_file"))
        patch.setattr(Path, "unlink", dying("unlink"))
        with pytest.raises(KeyboardInterrupt):
            compact_job(job.path, file_bytes=LARGE)
    start(job.path, prompts)[0].clear_uncommitted()
    assert rows(job) == before
    assert verify_job(job.path).problems == []
    assert len(list((job.path / "data").iterdir())) == (2 if step == 0 else 1)


def test_only_a_finished_and_intact_job_is_compacted(tmp_path: Path, prompts: Path, job: JobFolder) -> None:
    folder, _ = start(tmp_path / "begun", prompts)
    with pytest.raises(UserError, match="is not finished"):
        compact_job(folder.path, file_bytes=LARGE)
    path = job.path / "data" / "part-a.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(JobError, match=r"part-a\.parquet: cannot be read"):
        compact_job(job.path, file_bytes=LARGE)
    assert len(list((job.path / "data").iterdir())) == 2
