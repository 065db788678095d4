"""Which parts count on an object store: whatever a writer that outlived its attempt puts there, and whenever."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job_helpers import all_ids, result_rows, start, write_prompts
from tide_ray.data import adoption
from tide_ray.data.adoption import adopt_parts, own_prefix
from tide_ray.data.compact_job import compact_job
from tide_ray.data.job_folder import JobFolder
from tide_ray.data.manifest import part_files
from tide_ray.data.object_path import ObjectPath
from tide_ray.data.parts import make_error_table, write_part
from tide_ray.data.reading import for_arrow
from tide_ray.data.storage import storage_path
from tide_ray.data.verify import verify_job
from tide_ray.types import JobError


@pytest.fixture
def output(bucket: str) -> ObjectPath:
    path = storage_path(f"{bucket}/out", "output")
    assert isinstance(path, ObjectPath)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl")


def part(folder: JobFolder, number: int, kind: str = "data") -> ObjectPath:
    assert isinstance(folder.path, ObjectPath)
    return folder.path / kind / f"{own_prefix(folder.attempt)}{number:06d}.parquet"


def commit(folder: JobFolder, number: int, ids: list[str]) -> None:
    write_part(folder.scratch, part(folder, number), [result_rows(ids)], folder.fields())


class Late:
    """A part that an attempt has ready, past all its looks at whether it is still on, and puts when it is told."""

    def __init__(self, folder: JobFolder, number: int, ids: list[str], tmp_path: Path) -> None:
        self._target = part(folder, number)
        local = tmp_path / "late" / folder.attempt
        local.mkdir(parents=True)
        write_part(local, tmp_path / "late" / self._target.name, [result_rows(ids)], folder.fields())
        self._content = (tmp_path / "late" / self._target.name).read_bytes()

    def put(self) -> None:
        self._target.put(self._content)


def rows(folder: JobFolder) -> list[str]:
    paths = part_files(folder.path, "data")
    return sorted(row for path in paths for row in pq.read_table(for_arrow(path))["row_id"].to_pylist())


def finish(folder: JobFolder, num_rows: int, num_late: int) -> None:
    """What the job does once all rows are there."""
    assert len(folder.remove_late_parts()) == num_late
    committed = folder.committed()
    assert (len(committed.data), len(committed.errors), committed.num_rows) == (num_rows, 1, num_rows + 1)
    folder.finish({}, {"rows": num_rows, "errors": 1})
    folder.clear_uncommitted()
    assert verify_job(folder.path).problems == []


def test_a_part_that_comes_after_its_attempt_is_over_does_not_count(
    output: ObjectPath, prompts: Path, tmp_path: Path
) -> None:
    first, _ = start(output, prompts)
    ids = all_ids(first)
    first.write_bad_rows(first.committed(), first.fields())
    commit(first, 0, ids[:2])
    late = Late(first, 1, ids[2:5], tmp_path)

    second, _ = start(output, prompts)  # the first was killed
    assert second.write_todo(second.committed())[1] == 3
    late.put()
    assert second.committed().data == set(ids[:2])
    commit(second, 0, ids[2:5])
    assert rows(second) == sorted(ids[:5])
    assert any("by an attempt that was over" in problem for problem in verify_job(output).problems)

    third, _ = start(output, prompts)  # so was the second, before it could clean up
    assert third.committed().num_ids == 6
    assert rows(third) == sorted(ids[:5])
    finish(third, 5, num_late=1)

    late.put()  # even now
    assert len(verify_job(output).problems) == 1
    again, _ = start(output, prompts)
    assert again.finished() is not None
    assert again.remove_late_parts() == [f"data/{part(first, 1).name}"]
    again.clear_uncommitted()
    assert verify_job(output).problems == []


def test_a_part_that_came_before_the_next_attempt_looked_counts(
    output: ObjectPath, prompts: Path, tmp_path: Path
) -> None:
    first, _ = start(output, prompts)
    ids = all_ids(first)
    late = Late(first, 0, ids[:4], tmp_path)
    first.clear_uncommitted()
    late.put()
    second, _ = start(output, prompts)
    assert second.committed().data == set(ids[:4])
    assert second.remove_late_parts() == []


def test_a_writer_stops_once_its_attempt_is_over(output: ObjectPath, prompts: Path) -> None:
    first, _ = start(output, prompts)
    ids = all_ids(first)
    second, _ = start(output, prompts)
    with pytest.raises(FileNotFoundError):
        commit(first, 0, ids[:1])
    assert second.committed().num_rows == 0
    assert not (output / "data").is_dir()


def test_a_task_that_runs_again_changes_nothing_and_never_drops_rows(output: ObjectPath, prompts: Path) -> None:
    folder, _ = start(output, prompts)
    ids = all_ids(folder)
    commit(folder, 0, ids[:3])
    version = part(folder, 0).stat().version
    commit(folder, 0, ids[:3])
    commit(folder, 0, ids[:2])  # after a drain fewer of its rows were finished
    assert part(folder, 0).stat().version == version
    with pytest.raises(JobError, match="written twice, with other rows"):
        commit(folder, 0, ids[1:4])


def test_rejected_rows_that_are_tried_again_do_not_come_back(output: ObjectPath, prompts: Path, tmp_path: Path) -> None:
    first, _ = start(output, prompts)
    ids = all_ids(first)
    rejected = make_error_table(*(pa.chunked_array([[text]]) for text in (ids[4], "no memory", "4")))
    path = part(first, 0, "errors")
    write_part(first.scratch, path, [rejected], first.fields())
    content = path.read_bytes()

    second, _ = start(output, prompts)
    assert second.take_back_errors() == 1
    path.put(content)  # a writer of the first that had not heard of its success
    assert second.committed().errors == set()
    todo, num_left = second.write_todo(second.committed())
    assert num_left == 6
    paths = sorted(todo.glob("*.parquet"))
    attempts = {row["row_id"]: row["attempts"] for row in pq.read_table(for_arrow(paths[0])).to_pylist()}
    assert attempts[ids[4]] == 1
    assert second.remove_late_parts() == [f"errors/{path.name}"]


def test_merged_parts_do_not_come_back(output: ObjectPath, prompts: Path) -> None:
    folder, _ = start(output, prompts)
    ids = all_ids(folder)
    folder.write_bad_rows(folder.committed(), folder.fields())
    commit(folder, 0, ids[:2])
    commit(folder, 1, ids[2:5])
    content = part(folder, 0).read_bytes()
    finish(folder, 5, num_late=0)
    assert compact_job(output, file_bytes=1 << 30) == {"data": (2, 1), "errors": (1, 1)}
    assert verify_job(output).problems == []
    part(folder, 0).put(content)
    assert rows(folder) == sorted(ids[:5])
    assert compact_job(output, file_bytes=1 << 30) == {"data": (1, 1), "errors": (1, 1)}
    assert not part(folder, 0).exists()


def test_an_attempt_that_lost_the_output_cannot_bring_its_view_back(
    output: ObjectPath, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(output, prompts)
    read = adoption._read

    def suspended(folder: ObjectPath) -> tuple[object, object]:
        """Another attempt begins while this one sleeps between its look and its write."""
        found = read(folder)
        monkeypatch.setattr(adoption, "_read", read)
        start(output, prompts)
        return found

    monkeypatch.setattr(adoption, "_read", suspended)
    with pytest.raises(JobError, match="was taken over by another attempt"):
        adopt_parts(output, "suspended", ["data"], lambda: None)
